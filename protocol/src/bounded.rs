//! Lists with a limit that is checked while they are decoded, before memory is taken for them.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

struct AtMost<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for AtMost<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let announced = seq.size_hint().unwrap_or(0);
        if announced > MAX {
            return Err(A::Error::invalid_length(announced, &self));
        }
        let mut list = Vec::with_capacity(announced);
        while let Some(element) = seq.next_element()? {
            if list.len() == MAX {
                return Err(A::Error::invalid_length(MAX + 1, &self));
            }
            list.push(element);
        }
        Ok(list)
    }
}

/// For `#[serde(deserialize_with = "bounded::list::<_, _, MAX>")]`.
///
/// # Errors
/// What the decoder says, and a list longer than `MAX`.
pub fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>, const MAX: usize>(decoder: D) -> Result<Vec<T>, D::Error> {
    decoder.deserialize_seq(AtMost::<T, MAX>(PhantomData))
}
