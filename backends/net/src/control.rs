//! Commands of the control queue (virtio 1.2, section 5.1.6.5).

use atoll_kit::chain::Chain;
use thiserror::Error;
use vm_memory::{Bytes, GuestMemory};

use crate::filter::{Mac, Rules, TABLE_MAX, is_group};

/// Longest command that is read: two address tables far beyond [`TABLE_MAX`], and no more.
pub const COMMAND_MAX: usize = 16 << 10;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_MQ: u8 = 4;

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Take every frame, or not.
    Promiscuous(bool),
    /// Take every group, or not.
    AllGroups(bool),
    /// The addresses that are wanted besides the card's own.
    Table {
        /// Single ones.
        single: Vec<Mac>,
        /// There were more.
        single_overflow: bool,
        /// Groups.
        groups: Vec<Mac>,
        /// There were more.
        groups_overflow: bool,
    },
    /// The card's own address.
    Address(Mac),
    /// So many queue pairs are used from now on.
    Pairs(u16),
}

/// Why a command is answered with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CommandError {
    /// Nobody has offered it.
    #[error("there is no command {command} of class {class}")]
    Unknown {
        /// Class.
        class: u8,
        /// Command.
        command: u8,
    },
    /// It ends too early or goes on too long.
    #[error("a command has the wrong length")]
    Length,
    /// An address of a group as the card's own.
    #[error("an address of a group cannot be a card's own")]
    Group,
    /// Outside what was offered.
    #[error("{0} queue pairs cannot be used")]
    Pairs(u16),
}

impl Command {
    /// Reads a command; `pairs_max` is what the configuration space says.
    pub fn parse(bytes: &[u8], pairs_max: u16) -> Result<Self, CommandError> {
        let [class, command, data @ ..] = bytes else { return Err(CommandError::Length) };
        match (*class, *command, data) {
            (CLASS_RX, 0, [on]) => Ok(Self::Promiscuous(*on != 0)),
            (CLASS_RX, 1, [on]) => Ok(Self::AllGroups(*on != 0)),
            (CLASS_MAC, 0, data) => {
                let (single, single_overflow, rest) = table(data)?;
                let (groups, groups_overflow, rest) = table(rest)?;
                if !rest.is_empty() {
                    return Err(CommandError::Length);
                }
                Ok(Self::Table { single, single_overflow, groups, groups_overflow })
            }
            (CLASS_MAC, 1, data) => {
                let mac: Mac = data.try_into().map_err(|_| CommandError::Length)?;
                if is_group(&mac) { Err(CommandError::Group) } else { Ok(Self::Address(mac)) }
            }
            (CLASS_MQ, 0, [low, high]) => {
                let pairs = u16::from_le_bytes([*low, *high]);
                if (1..=pairs_max).contains(&pairs) { Ok(Self::Pairs(pairs)) } else { Err(CommandError::Pairs(pairs)) }
            }
            (CLASS_RX, 0 | 1, _) | (CLASS_MQ, 0, _) => Err(CommandError::Length),
            (class, command, _) => Err(CommandError::Unknown { class, command }),
        }
    }

    /// Changes the rules as the command says; nothing for one that is not about addresses.
    pub fn apply(&self, rules: &mut Rules) {
        match self {
            Self::Promiscuous(on) => rules.promiscuous = *on,
            Self::AllGroups(on) => rules.all_groups = *on,
            Self::Table { single, single_overflow, groups, groups_overflow } => {
                rules.single.clone_from(single);
                rules.groups.clone_from(groups);
                (rules.single_overflow, rules.groups_overflow) = (*single_overflow, *groups_overflow);
            }
            Self::Address(mac) => rules.own = *mac,
            Self::Pairs(_) => {}
        }
    }
}

/// One table of addresses: what is kept of it, whether there were more, and what follows it.
fn table(bytes: &[u8]) -> Result<(Vec<Mac>, bool, &[u8]), CommandError> {
    let (count, rest) = bytes.split_first_chunk::<4>().ok_or(CommandError::Length)?;
    let count = u32::from_le_bytes(*count) as usize;
    let len = count.checked_mul(size_of::<Mac>()).ok_or(CommandError::Length)?;
    let (addresses, rest) = rest.split_at_checked(len).ok_or(CommandError::Length)?;
    let (addresses, _) = addresses.as_chunks::<6>();
    let kept = addresses.get(..TABLE_MAX.min(addresses.len())).unwrap_or_default();
    if addresses.len() > TABLE_MAX { Ok((Vec::new(), true, rest)) } else { Ok((kept.to_vec(), false, rest)) }
}

/// Takes a request of the control queue, does it by `act`, and writes the answer; the bytes written.
pub fn serve<M: GuestMemory>(
    mem: &M,
    chain: &Chain,
    pairs_max: u16,
    act: impl FnOnce(Command) -> Result<(), CommandError>,
) -> u32 {
    let readable = chain.readable();
    let Some(ack) = chain.writable().last_byte() else { return 0 };
    let len = readable.bytes();
    let done = if len > COMMAND_MAX as u64 {
        Err(CommandError::Length)
    } else {
        let mut bytes = vec![0; len as usize];
        match readable.read_at(mem, 0, &mut bytes) {
            Ok(()) => Command::parse(&bytes, pairs_max).and_then(act),
            Err(_) => Err(CommandError::Length),
        }
    };
    if let Err(error) = &done {
        // The guest decides how often: it is told of it, nobody else needs to be.
        tracing::debug!(%error, "a control command is refused");
    }
    u32::from(mem.write_slice(&[u8::from(done.is_err())], ack).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_read_as_the_specification_lays_them_out() {
        let parse = |bytes: &[u8]| Command::parse(bytes, 4);
        assert_eq!(parse(&[0, 0, 1]), Ok(Command::Promiscuous(true)));
        assert_eq!(parse(&[0, 1, 0]), Ok(Command::AllGroups(false)));
        assert_eq!(parse(&[1, 1, 2, 0, 0, 0, 0, 9]), Ok(Command::Address([2, 0, 0, 0, 0, 9])));
        assert_eq!(parse(&[4, 0, 4, 0]), Ok(Command::Pairs(4)));
        let mut table = vec![1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 7, 2, 0, 0, 0];
        table.extend_from_slice(&[0x33, 0x33, 0, 0, 0, 1, 1, 0, 0x5e, 0, 0, 1]);
        assert_eq!(
            parse(&table),
            Ok(Command::Table {
                single: vec![[2, 0, 0, 0, 0, 7]],
                single_overflow: false,
                groups: vec![[0x33, 0x33, 0, 0, 0, 1], [1, 0, 0x5e, 0, 0, 1]],
                groups_overflow: false,
            })
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let cases: &[(&[u8], CommandError)] = &[
            (&[], CommandError::Length),
            (&[0], CommandError::Length),
            (&[0, 0], CommandError::Length),
            (&[0, 2, 1], CommandError::Unknown { class: 0, command: 2 }),
            (&[2, 0, 1, 0], CommandError::Unknown { class: 2, command: 0 }),
            (&[1, 0, 1, 0, 0, 0], CommandError::Length),
            (&[1, 0, 0xff, 0xff, 0xff, 0xff, 1, 2], CommandError::Length),
            (&[1, 1, 1, 0, 0, 0, 0, 9], CommandError::Group),
            (&[1, 1, 2, 0], CommandError::Length),
            (&[4, 0, 0, 0], CommandError::Pairs(0)),
            (&[4, 0, 5, 0], CommandError::Pairs(5)),
            (&[4, 0, 1], CommandError::Length),
        ];
        for (bytes, error) in cases {
            assert_eq!(Command::parse(bytes, 4), Err(*error), "{bytes:?}");
        }
    }

    #[test]
    fn a_table_that_is_too_long_takes_all_of_its_kind() {
        let mut bytes = vec![1, 0, 65, 0, 0, 0];
        bytes.extend(std::iter::repeat_n([2, 0, 0, 0, 0, 1], 65).flatten());
        bytes.extend_from_slice(&[0; 4]);
        let Ok(Command::Table { single, single_overflow: true, groups_overflow: false, .. }) =
            Command::parse(&bytes, 1)
        else {
            panic!("a table");
        };
        assert!(single.is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_command_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut rules = Rules::default();
            if let Ok(command) = Command::parse(&bytes, 8) {
                command.apply(&mut rules);
            }
            prop_assert!(rules.single.len() <= TABLE_MAX && rules.groups.len() <= TABLE_MAX && !is_group(&rules.own));
        }
    }
}
