//! When one side of a split virtqueue wakes the other (virtio 1.2, 2.7.7 and 2.7.10), as both sides do it.
//!
//! A side that goes to sleep writes down when it wants to be woken, and looks once more; a side that has something new
//! shows it, and reads whether that is wanted. Each writes one word and then reads the other's, so each needs a full fence
//! in between: without it both may read what was there before, the one sleeps and the other does not wake it. That holds
//! for kicks and for calls alike, which is why the rule is here once, and everybody who drives a ring uses it: device
//! processes, the front end's own rings, and the drivers of tests. It is tried under every order of memory accesses with
//! loom (in the kit, whose rings use it).

/// What the other side has written about its sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// VIRTIO_RING_F_EVENT_IDX: it wants to hear when the index goes past this one.
    Past(u16),
    /// Without: whether it wants to hear.
    Always(bool),
}

impl Wish {
    /// Whether it is to be woken for an index that has gone from `before` to `now`.
    #[must_use]
    #[inline]
    pub fn is_due(self, before: u16, now: u16) -> bool {
        match self {
            Self::Past(event) => now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before),
            Self::Always(wanted) => wanted && now != before,
        }
    }
}

/// One side's view of the words by which the two wake each other.
pub trait Words {
    /// Why a word cannot be reached.
    type Error;
    /// Asks to be woken: as soon as the other's index goes past `next`.
    ///
    /// # Errors
    /// If the word cannot be reached; so too below.
    fn ask(&mut self, next: u16) -> Result<(), Self::Error>;
    /// What the other side has asked for.
    fn wish(&self) -> Result<Wish, Self::Error>;
    /// The other side's index, with everything that was written before it.
    fn shown(&self) -> Result<u16, Self::Error>;
    /// Orders everything before it before everything after it, for everybody who does the same.
    #[inline]
    fn fence(&self) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// This side's index has gone from `before` to `now`, and is shown: whether the other side is to be woken.
///
/// # Errors
/// If a word cannot be reached.
#[inline]
pub fn is_to_be_woken<W: Words>(words: &W, before: u16, now: u16) -> Result<bool, W::Error> {
    if before == now {
        return Ok(false);
    }
    // What is shown must be seen before the wish is read.
    words.fence();
    Ok(words.wish()?.is_due(before, now))
}

/// This side has taken everything before `next` and wants to sleep: whether it must not, because there is more already.
///
/// # Errors
/// If a word cannot be reached.
#[inline]
pub fn ask_to_be_woken<W: Words>(words: &mut W, next: u16) -> Result<bool, W::Error> {
    words.ask(next)?;
    // The wish must be seen before it is looked whether the other side has been faster.
    words.fence();
    Ok(words.shown()? != next)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The specification's condition, over the wrap of the indices, and for several steps at once.
    #[test]
    fn a_wish_is_due_when_the_index_goes_past_it() {
        for (event, before, now, due) in [
            (0, 0, 1, true),
            (0, 1, 2, false),
            (5, 3, 5, false),
            (5, 3, 6, true),
            (5, 3, 9, true),
            (0xffff, 0xfffe, 0, true),
            (0xffff, 0, 1, false),
            (1, 0xfff0, 2, true),
            (7, 7, 7, false),
        ] {
            assert_eq!(Wish::Past(event).is_due(before, now), due, "{event} {before} {now}");
        }
        assert!(
            Wish::Always(true).is_due(3, 4) && !Wish::Always(true).is_due(4, 4) && !Wish::Always(false).is_due(3, 4)
        );
    }
}
