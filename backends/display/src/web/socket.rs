//! WebSockets: one that carries a viewer's conversation as if it were a stream, and one that carries the serial console.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::serial::Serial;

/// The longest message of a browser: what is typed is short.
const MESSAGE_MAX: usize = 64 << 10;
/// Bytes on the way between a viewer's conversation and its socket.
pub const BUFFER: usize = 64 << 10;
/// How long a browser may take to read a piece of the console.
const READ_MAX: Duration = Duration::from_secs(10);
/// Bytes of the console that are sent together.
const PIECE: usize = 8 << 10;

/// A browser's socket, once HTTP is over.
pub type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Speaks WebSocket on an upgraded connection.
pub async fn accept(upgraded: Upgraded) -> Socket {
    with_limits(TokioIo::new(upgraded)).await
}

/// The server's end of a WebSocket, with the limits of this program.
pub async fn with_limits<S: AsyncRead + AsyncWrite + Unpin>(stream: S) -> WebSocketStream<S> {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_MAX))
        .max_frame_size(Some(MESSAGE_MAX))
        .write_buffer_size(0)
        .max_write_buffer_size(4 * BUFFER);
    WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await
}

/// Carries bytes between a socket and a stream until either ends.
///
/// # Errors
/// What ends the socket before its time.
pub async fn bridge<S>(socket: WebSocketStream<S>, stream: DuplexStream) -> Result<(), tungstenite::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sink, mut source) = socket.split();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let inward = async {
        while let Some(message) = source.next().await {
            match message? {
                Message::Binary(bytes) => writer.write_all(&bytes).await?,
                Message::Close(_) | Message::Text(_) => break,
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
        Ok(())
    };
    let outward = async {
        let mut bytes = vec![0; BUFFER];
        loop {
            let count = reader.read(&mut bytes).await?;
            if count == 0 {
                return sink.close().await;
            }
            sink.send(Message::binary(bytes.get(..count).unwrap_or_default().to_vec())).await?;
        }
    };
    tokio::select! {
        end = inward => end,
        end = outward => end,
    }
}

/// Shows the serial console, from what is remembered of it on, and takes what is typed.
///
/// # Errors
/// What ends the socket before its time.
pub async fn console<S>(socket: WebSocketStream<S>, serial: Arc<Serial>) -> Result<(), tungstenite::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sink, mut source) = socket.split();
    let mut printed = serial.listen();
    let inward = async {
        while let Some(message) = source.next().await {
            match message? {
                Message::Binary(bytes) => serial.write(&bytes),
                Message::Text(text) => serial.write(text.as_bytes()),
                Message::Close(_) => break,
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
        Ok(())
    };
    let outward = async {
        let mut at = 0;
        loop {
            printed.mark_unchanged();
            let (bytes, end) = serial.since(at, PIECE);
            at = end;
            if bytes.is_empty() {
                if printed.changed().await.is_err() {
                    return sink.close().await;
                }
                continue;
            }
            // Who does not read misses what comes; who takes longer than this is gone.
            match timeout(READ_MAX, sink.send(Message::binary(bytes))).await {
                Ok(sent) => sent?,
                Err(_) => return Ok(()),
            }
        }
    };
    tokio::select! {
        end = inward => end,
        end = outward => end,
    }
}
