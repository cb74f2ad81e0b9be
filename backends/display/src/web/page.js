// The page: noVNC for the picture, and a small terminal for the serial console.
const at = (id) => document.getElementById(id);
const socket = (path) => new WebSocket(`ws://${location.host}${path}`);
const again = (then) => setTimeout(then, 1000);

let rfb = null;
let RFB = null;

function note(text) {
    at('note').textContent = text;
    at('note').hidden = text === '';
}

function view() {
    const head = at('head').value || '0';
    at('shot').href = `/screenshot.png?head=${head}`;
    if (rfb) {
        const old = rfb;
        rfb = null;
        old.disconnect();
    }
    const now = new RFB(at('screen'), `ws://${location.host}/websockify?head=${head}`, { shared: true });
    now.scaleViewport = !at('fit').checked;
    now.resizeSession = at('fit').checked;
    now.addEventListener('connect', () => { at('status').textContent = 'connected'; now.focus(); });
    now.addEventListener('disconnect', () => {
        if (rfb !== now) return;
        at('status').textContent = 'connecting';
        again(() => { if (rfb === now) view(); });
    });
    rfb = now;
    window.rfb = now;
}

// A terminal that prints lines. Of escape sequences it knows those that erase and move within a line; the others say nothing.
class Terminal {
    constructor(element) {
        this.element = element;
        this.lines = [''];
        this.column = 0;
        this.pending = '';
        this.decoder = new TextDecoder('utf-8');
        this.due = false;
    }
    put(bytes) {
        const text = this.pending + this.decoder.decode(bytes, { stream: true });
        this.pending = '';
        let i = 0;
        while (i < text.length) {
            if (text[i] === '\x1b') {
                const sequence = /^\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]+[0-~]|[0-Z\\^-~])/.exec(text.slice(i, i + 4096));
                if (!sequence) {
                    // The rest of it has not come, or it is none.
                    const rest = text.slice(i);
                    if (rest.length < 4096 && /^\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]*\x1b?|[ -/]*)$/.test(rest)) { this.pending = rest; break; }
                    i += 1;
                    continue;
                }
                this.obey(sequence[0]);
                i += sequence[0].length;
                continue;
            }
            this.character(text[i]);
            i += 1;
        }
        if (!this.due) {
            this.due = true;
            requestAnimationFrame(() => this.draw());
        }
    }
    character(c) {
        const last = this.lines.length - 1;
        if (c === '\n') { this.lines.push(''); this.column = 0; if (this.lines.length > 2000) this.lines.shift(); }
        else if (c === '\r') this.column = 0;
        else if (c === '\b') this.column = Math.max(0, this.column - 1);
        else if (c === '\t') { do this.character(' '); while (this.column % 8); }
        else if (c >= ' ' && c !== '\x7f') {
            const line = this.lines[last].padEnd(this.column);
            this.lines[last] = (line.slice(0, this.column) + c + line.slice(this.column + 1)).slice(0, 1000);
            this.column = Math.min(this.column + 1, 999);
        }
    }
    obey(sequence) {
        const last = this.lines.length - 1;
        const count = Math.max(1, parseInt(sequence.slice(2), 10) || 1);
        if (sequence[1] !== '[') return;
        switch (sequence[sequence.length - 1]) {
        case 'K': {
            const kind = sequence.slice(2, -1);
            if (kind === '2') this.lines[last] = '';
            else if (kind === '1') this.lines[last] = ' '.repeat(this.column) + this.lines[last].slice(this.column);
            else this.lines[last] = this.lines[last].slice(0, this.column);
            break;
        }
        case 'J': if (sequence === '\x1b[2J') { this.lines = ['']; this.column = 0; } break;
        case 'C': this.column = Math.min(this.column + count, 999); break;
        case 'D': this.column = Math.max(0, this.column - count); break;
        case 'G': this.column = Math.min(count, 1000) - 1; break;
        case 'P': this.lines[last] = this.lines[last].slice(0, this.column) + this.lines[last].slice(this.column + count); break;
        }
    }
    draw() {
        this.due = false;
        const low = this.element.scrollTop + this.element.clientHeight + 40 >= this.element.scrollHeight;
        this.element.textContent = this.lines.join('\n');
        if (low) this.element.scrollTop = this.element.scrollHeight;
    }
}

const named = {
    Enter: '\r', Backspace: '\x7f', Tab: '\t', Escape: '\x1b', ArrowUp: '\x1b[A', ArrowDown: '\x1b[B', ArrowRight: '\x1b[C',
    ArrowLeft: '\x1b[D', Home: '\x1b[H', End: '\x1b[F', Delete: '\x1b[3~', PageUp: '\x1b[5~', PageDown: '\x1b[6~',
};

function typed(event) {
    if (event.metaKey || event.altKey) return null;
    if (event.ctrlKey) {
        const letter = event.key.toUpperCase();
        return letter.length === 1 && letter >= '@' && letter <= '_' ? String.fromCharCode(letter.charCodeAt(0) - 64) : null;
    }
    return named[event.key] || ([...event.key].length === 1 ? event.key : null);
}

function serial() {
    const lines = at('lines');
    let line = null;
    const connect = () => {
        const terminal = new Terminal(lines);
        line = socket('/serial');
        line.binaryType = 'arraybuffer';
        line.onmessage = (message) => terminal.put(new Uint8Array(message.data));
        line.onclose = () => again(connect);
    };
    const say = (text) => { if (line && line.readyState === WebSocket.OPEN) line.send(new TextEncoder().encode(text)); };
    lines.addEventListener('keydown', (event) => {
        const text = typed(event);
        if (text !== null) { say(text); event.preventDefault(); }
    });
    lines.addEventListener('paste', (event) => { say(event.clipboardData.getData('text')); event.preventDefault(); });
    at('serial').hidden = false;
    connect();
}

async function begin() {
    const state = await (await fetch('/state.json')).json();
    for (const head of state.heads) at('head').add(new Option(head.head, head.head));
    if (state.serial) serial();
    if (!state.novnc) {
        at('status').textContent = 'no viewer';
        note(`The picture needs noVNC. ${state.novnc_missing} Other viewers can use the VNC socket; /screenshot.png shows a picture.`);
        return;
    }
    RFB = (await import('/novnc/core/rfb.js')).default;
    at('head').onchange = view;
    at('fit').onchange = view;
    at('cad').onclick = () => { if (rfb) rfb.sendCtrlAltDel(); };
    view();
}

begin().catch((error) => { at('status').textContent = 'failed'; note(String(error)); });
