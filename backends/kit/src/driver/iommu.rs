//! What a front end says of the addresses of a guest that has an IOMMU, and hears of them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};

/// VIRTIO_F_ACCESS_PLATFORM.
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// The device may read.
pub const READ: u8 = 1;
/// The device may write.
pub const WRITE: u8 = 2;

const FRONT_MSG: u32 = 22;
const BACK_MSG: u32 = 1;
const NEED_REPLY: u32 = 9;
const REPLY: u32 = 5;
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

/// The body of an IOTLB message: address, bytes, the front end's address, permissions, type.
fn body(iova: u64, len: u64, user: u64, permissions: u8, kind: u8) -> Vec<u8> {
    let mut body = [iova, len, user].map(u64::to_le_bytes).concat();
    body.extend([permissions, kind, 0, 0, 0, 0, 0, 0]);
    body
}

/// Sends a message on the conversation's socket and waits for its answer; whether it is yes.
pub fn say(mut stream: &UnixStream, flags: u32, body: &[u8]) -> Result<bool> {
    let mut message = [FRONT_MSG, flags, body.len() as u32].map(u32::to_le_bytes).concat();
    message.extend(body);
    stream.write_all(&message)?;
    let mut answer = [0; 20];
    stream.read_exact(&mut answer)?;
    ensure!(answer[..12] == [FRONT_MSG, REPLY, 8].map(u32::to_le_bytes).concat(), "an answer to something else");
    Ok(answer[12..].iter().all(|byte| *byte == 0))
}

/// Tells where a range leads; whether the device takes it.
pub fn update(stream: &UnixStream, iova: u64, len: u64, user: u64, permissions: u8) -> Result<bool> {
    say(stream, NEED_REPLY, &body(iova, len, user, permissions, UPDATE))
}

/// Takes a range back; whether the device agrees, after which it uses nothing of it.
pub fn invalidate(stream: &UnixStream, iova: u64, len: u64) -> Result<bool> {
    say(stream, NEED_REPLY, &body(iova, len, 0, 0, INVALIDATE))
}

/// Hears the next question on the back channel: address and permissions.
pub fn hear_miss(mut channel: &UnixStream) -> Result<(u64, u8)> {
    let mut message = [0; 44];
    channel.read_exact(&mut message)?;
    ensure!(message[..12] == [BACK_MSG, NEED_REPLY, 32].map(u32::to_le_bytes).concat(), "not a question: {message:?}");
    ensure!(message[37] == MISS, "type {}", message[37]);
    let mut iova = [0; 8];
    iova.copy_from_slice(&message[12..20]);
    Ok((u64::from_le_bytes(iova), message[36]))
}

/// Answers it.
pub fn answer_miss(mut channel: &UnixStream, yes: bool) -> Result<()> {
    let words = [BACK_MSG, REPLY, 8, u32::from(!yes), 0];
    Ok(channel.write_all(&words.map(u32::to_le_bytes).concat())?)
}
