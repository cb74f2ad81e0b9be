//! The beginning of a conversation: version, security, password, and what both want to know of the other (RFC 6143, 7.1-7.3).
//!
//! A state machine: who drives it gives it as many bytes as it asks for and sends what it answers.

use super::RfbError;
use super::auth::{self, CHALLENGE};
use super::format::PixelFormat;

/// What is said first.
const VERSION: &[u8; 12] = b"RFB 003.008\n";
/// Security types.
const NONE: u8 = 1;
const PASSWORD: u8 = 2;

/// Who may look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Security {
    /// Whoever got here.
    Open,
    /// Who knows a password, asked by these bytes, which nobody can foresee.
    Password {
        /// It.
        password: Vec<u8>,
        /// The question.
        challenge: [u8; CHALLENGE],
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Version,
    Choice,
    Response,
    Init,
    Done,
}

/// The beginning of one conversation.
#[derive(Debug)]
pub struct Hello {
    security: Security,
    state: State,
}

/// What is to be sent, and what came of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes for the viewer, to be sent in any case.
    pub answer: Vec<u8>,
    /// Whether it goes on.
    pub outcome: Result<(), RfbError>,
}

impl Step {
    fn on(answer: Vec<u8>) -> Self {
        Self { answer, outcome: Ok(()) }
    }
    fn end(answer: Vec<u8>, error: RfbError) -> Self {
        Self { answer, outcome: Err(error) }
    }
}

/// A refusal with its reason.
fn refusal(reason: &str) -> Vec<u8> {
    let mut answer = 1_u32.to_be_bytes().to_vec();
    answer.extend((reason.len() as u32).to_be_bytes());
    answer.extend(reason.as_bytes());
    answer
}

impl Hello {
    /// A conversation, and its first words.
    #[must_use]
    pub fn new(security: Security) -> (Self, Vec<u8>) {
        (Self { security, state: State::Version }, VERSION.to_vec())
    }

    /// How many bytes the viewer has to say next; none, when this is over.
    #[must_use]
    pub fn wants(&self) -> Option<usize> {
        match self.state {
            State::Version => Some(VERSION.len()),
            State::Choice | State::Init => Some(1),
            State::Response => Some(CHALLENGE),
            State::Done => None,
        }
    }

    /// Takes what was wanted. A picture of this size and name is what the viewer will see.
    pub fn hear(&mut self, said: &[u8], (width, height): (u16, u16), name: &str) -> Step {
        match (self.state, said) {
            (State::Version, said) => self.version(said),
            (State::Choice, [chosen]) => self.choice(*chosen),
            (State::Response, said) => self.response(said),
            (State::Init, _) => {
                self.state = State::Done;
                let mut answer = [width.to_be_bytes(), height.to_be_bytes()].concat();
                answer.extend(PixelFormat::NATIVE.encode());
                answer.extend((name.len() as u32).to_be_bytes());
                answer.extend(name.as_bytes());
                Step::on(answer)
            }
            (State::Choice | State::Done, _) => Step::on(Vec::new()),
        }
    }

    fn version(&mut self, said: &[u8]) -> Step {
        let numbers = said
            .strip_prefix(b"RFB ")
            .and_then(|rest| rest.strip_suffix(b"\n"))
            .and_then(|text| std::str::from_utf8(text).ok())
            .and_then(|text| text.split_once('.'))
            .and_then(|(major, minor)| Some((major.parse::<u16>().ok()?, minor.parse::<u16>().ok()?)));
        match numbers {
            Some(numbers) if numbers >= (3, 8) => {
                self.state = State::Choice;
                Step::on(vec![1, if matches!(self.security, Security::Open) { NONE } else { PASSWORD }])
            }
            numbers => {
                let error = RfbError::Version(String::from_utf8_lossy(said).into_owned());
                // Who speaks an older version understands a refusal.
                let answer = if numbers.is_some() {
                    let mut answer = vec![0];
                    answer.extend(refusal("this server speaks RFB 3.8").split_off(4));
                    answer
                } else {
                    Vec::new()
                };
                Step::end(answer, error)
            }
        }
    }

    fn choice(&mut self, chosen: u8) -> Step {
        match (&self.security, chosen) {
            (Security::Open, NONE) => {
                self.state = State::Init;
                Step::on(vec![0; 4])
            }
            (Security::Password { challenge, .. }, PASSWORD) => {
                self.state = State::Response;
                Step::on(challenge.to_vec())
            }
            _ => Step::end(refusal("this security type was not offered"), RfbError::Security(chosen)),
        }
    }

    fn response(&mut self, said: &[u8]) -> Step {
        let right = match &self.security {
            Security::Open => false,
            Security::Password { password, challenge } => auth::is_same(&auth::response(password, challenge), said),
        };
        if right {
            self.state = State::Init;
            return Step::on(vec![0; 4]);
        }
        Step::end(refusal("wrong password"), RfbError::Password)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: (u16, u16) = (640, 480);

    fn talk(security: Security, said: &[&[u8]]) -> (Vec<u8>, Result<(), RfbError>) {
        let (mut hello, mut heard) = Hello::new(security);
        for said in said {
            let step = hello.hear(said, SIZE, "a guest");
            heard.extend(step.answer);
            if step.outcome.is_err() {
                return (heard, step.outcome);
            }
        }
        assert_eq!(hello.wants(), None);
        (heard, Ok(()))
    }

    #[test]
    fn who_knows_the_password_is_let_in() {
        let (heard, done) = talk(Security::Open, &[VERSION, &[1], &[1]]);
        assert_eq!((done, heard.len()), (Ok(()), 12 + 2 + 4 + 24 + 7));
        assert_eq!(heard[18..22], [2, 128, 1, 224]);
        let challenge = [7; CHALLENGE];
        let security = || Security::Password { password: b"secret".to_vec(), challenge };
        let right = auth::response(b"secret", &challenge);
        assert!(talk(security(), &[VERSION, &[2], &right, &[0]]).1.is_ok());
        let wrong = auth::response(b"Secret", &challenge);
        let (heard, end) = talk(security(), &[VERSION, &[2], &wrong]);
        assert_eq!((end, &heard[heard.len() - 14..]), (Err(RfbError::Password), &b"wrong password"[..]));
        assert_eq!(talk(security(), &[VERSION, &[1]]).1, Err(RfbError::Security(1)), "not without");
        assert_eq!(talk(Security::Open, &[VERSION, &[2]]).1, Err(RfbError::Security(2)));
    }

    #[test]
    fn other_protocols_are_told_apart() {
        assert!(talk(Security::Open, &[b"RFB 003.889\n", &[1], &[1]]).1.is_ok(), "a Macintosh");
        let (heard, end) = talk(Security::Open, &[b"RFB 003.003\n"]);
        assert!(heard.ends_with(b"3.8") && matches!(end, Err(RfbError::Version(_))));
        for said in [b"GET / HTTP/1", b"RFB 003:008\n", &[0xff; 12]] {
            let (heard, end) = talk(Security::Open, &[said]);
            assert!(heard.len() == 12 && matches!(end, Err(RfbError::Version(_))));
        }
    }
}
