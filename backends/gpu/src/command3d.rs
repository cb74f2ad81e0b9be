//! The words that 3D adds to the control queue (virtio 1.2, 5.7.6.8), read as hostile input.

use crate::command::{Fields, Header, Refusal};
use crate::render::{Box3, Shape, Transfer};

const GET_CAPSET_INFO: u32 = 0x0108;
const GET_CAPSET: u32 = 0x0109;
const CTX_CREATE: u32 = 0x0200;
const CTX_DESTROY: u32 = 0x0201;
const CTX_ATTACH_RESOURCE: u32 = 0x0202;
const CTX_DETACH_RESOURCE: u32 = 0x0203;
const RESOURCE_CREATE_3D: u32 = 0x0204;
const TRANSFER_TO_HOST_3D: u32 = 0x0205;
const TRANSFER_FROM_HOST_3D: u32 = 0x0206;
const SUBMIT_3D: u32 = 0x0207;

/// Bytes of SUBMIT_3D before its stream.
pub const SUBMIT_LEN: u64 = 32;
/// Most bytes of a stream; Mesa's have up to 260 KiB.
pub const STREAM_MAX: u32 = 4 << 20;
/// Bytes of a context's name at most.
pub const NAME_MAX: usize = 64;

/// A command of 3D. Ids, sizes and boxes are numbers that were not looked at; the context is the header's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command3d {
    /// What there is at this place of the list of capability sets.
    CapsetInfo {
        /// The place.
        index: u32,
    },
    /// What a capability set says.
    Capset {
        /// Its number.
        id: u32,
        /// Its version.
        version: u32,
    },
    /// A context begins.
    Begin {
        /// What its program is called.
        name: [u8; NAME_MAX],
        /// So many bytes of it.
        len: usize,
    },
    /// It ends.
    End,
    /// It may use a resource.
    Join {
        /// The resource.
        id: u32,
    },
    /// It may not any more.
    Part {
        /// The resource.
        id: u32,
    },
    /// A resource is made.
    Create {
        /// Its id.
        id: u32,
        /// What it is.
        shape: Shape,
    },
    /// Data goes from a backing to its resource, or the other way.
    Transfer(Transfer),
    /// A stream is to be carried out.
    Submit {
        /// Its bytes.
        bytes: u32,
    },
}

impl Command3d {
    /// Reads what follows a header.
    ///
    /// # Errors
    /// [`Refusal::Command`], [`Refusal::Short`] and [`Refusal::Stream`].
    pub fn read(header: &Header, body: &[u8]) -> Result<Self, Refusal> {
        let mut fields = Fields::of(body);
        Ok(match header.kind {
            GET_CAPSET_INFO => Self::CapsetInfo { index: fields.u32()? },
            GET_CAPSET => Self::Capset { id: fields.u32()?, version: fields.u32()? },
            CTX_CREATE => {
                let len = fields.u32()? as usize;
                // The kind of the context, which belongs to a feature that is not offered.
                fields.u32()?;
                Self::Begin { name: fields.take()?, len: len.min(NAME_MAX) }
            }
            CTX_DESTROY => Self::End,
            CTX_ATTACH_RESOURCE => Self::Join { id: fields.u32()? },
            CTX_DETACH_RESOURCE => Self::Part { id: fields.u32()? },
            RESOURCE_CREATE_3D => {
                let id = fields.u32()?;
                let (target, format, bind) = (fields.u32()?, fields.u32()?, fields.u32()?);
                let (width, height, depth, array_size) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
                let (last_level, samples, flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
                let shape =
                    Shape { target, format, bind, width, height, depth, array_size, last_level, samples, flags };
                Self::Create { id, shape }
            }
            TRANSFER_TO_HOST_3D | TRANSFER_FROM_HOST_3D => {
                let (x, y, z) = (fields.u32()?, fields.u32()?, fields.u32()?);
                let area = Box3 { x, y, z, width: fields.u32()?, height: fields.u32()?, depth: fields.u32()? };
                let offset = fields.u64()?;
                let (id, level, stride, layer_stride) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
                let (context, to_host) = (header.context, header.kind == TRANSFER_TO_HOST_3D);
                Self::Transfer(Transfer { id, context, area, level, stride, layer_stride, offset, to_host })
            }
            SUBMIT_3D => {
                let bytes = fields.u32()?;
                if bytes > STREAM_MAX || !bytes.is_multiple_of(4) {
                    return Err(Refusal::Stream(bytes));
                }
                Self::Submit { bytes }
            }
            other => return Err(Refusal::Command(other)),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn command(kind: u32, body: &[u32]) -> Result<Command3d, Refusal> {
        let bytes: Vec<u8> = body.iter().flat_map(|word| word.to_le_bytes()).collect();
        Command3d::read(&Header { kind, context: 9, ..Header::default() }, &bytes)
    }

    #[test]
    fn commands_are_read_as_the_specification_lays_them_out() {
        assert_eq!(command(0x108, &[1, 0]), Ok(Command3d::CapsetInfo { index: 1 }));
        assert_eq!(command(0x109, &[2, 1]), Ok(Command3d::Capset { id: 2, version: 1 }));
        let mut begin = vec![4, 0];
        begin.extend([0x6162_6364; 16]);
        assert_eq!(
            command(0x200, &begin),
            Ok(Command3d::Begin { name: *b"dcba".repeat(16).first_chunk().unwrap(), len: 4 })
        );
        begin[0] = 65;
        assert!(matches!(command(0x200, &begin), Ok(Command3d::Begin { len: 64, .. })));
        assert_eq!(command(0x200, &begin[..17]), Err(Refusal::Short(92)));
        assert_eq!(command(0x201, &[]), Ok(Command3d::End));
        assert_eq!(command(0x202, &[7, 0]), Ok(Command3d::Join { id: 7 }));
        assert_eq!(command(0x203, &[7, 0]), Ok(Command3d::Part { id: 7 }));
        let shape = Shape {
            target: 1,
            format: 2,
            bind: 3,
            width: 4,
            height: 5,
            depth: 6,
            array_size: 7,
            last_level: 8,
            samples: 9,
            flags: 10,
        };
        assert_eq!(command(0x204, &[7, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]), Ok(Command3d::Create { id: 7, shape }));
        let area = Box3 { x: 1, y: 2, z: 3, width: 4, height: 5, depth: 6 };
        let offset = 8 << 32 | 7;
        let transfer =
            Transfer { id: 9, context: 9, area, level: 10, stride: 11, layer_stride: 12, offset, to_host: true };
        let body = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        assert_eq!(command(0x205, &body), Ok(Command3d::Transfer(transfer)));
        assert_eq!(command(0x206, &body), Ok(Command3d::Transfer(Transfer { to_host: false, ..transfer })));
        assert_eq!(command(0x207, &[8, 0]), Ok(Command3d::Submit { bytes: 8 }));
        assert_eq!(command(0x207, &[7, 0]), Err(Refusal::Stream(7)));
        assert_eq!(command(0x207, &[STREAM_MAX + 4, 0]), Err(Refusal::Stream(STREAM_MAX + 4)));
        assert_eq!(command(0x208, &[0; 16]), Err(Refusal::Command(0x208)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_command_or_an_error(data in prop::collection::vec(any::<u8>(), 0..120), kind in 0x1f0_u32..0x210) {
            let _ = Command3d::read(&Header { kind, ..Header::default() }, &data);
        }
    }
}
