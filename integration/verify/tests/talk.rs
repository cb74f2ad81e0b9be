//! Two ends over networks that do different things to frames.

use atoll_verify::dice::Dice;
use atoll_verify::net::{Promise, TalkVerdict, Talker};
use proptest::prelude::*;

/// What a network does to a frame that is under way.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Deed {
    Nothing,
    Lose,
    Repeat,
    Swap,
    Flip,
    Stop,
}

/// Two ends talk for two seconds of a made-up clock; one in a hundred frames suffers the deed. Gives both verdicts.
fn talk(seed: u64, deed: Deed, promise: &Promise) -> [TalkVerdict; 2] {
    let mut ends = [0, 1].map(|me| Talker::new(seed, me, Talker::address(me), 16));
    let mut wires: [Vec<Vec<u8>>; 2] = [Vec::new(), Vec::new()];
    let mut dice = Dice::new(seed);
    let mut struck = 0;
    for now in 0..4000 {
        for me in 0..2 {
            if now == 2000 {
                ends[me].close();
            }
            for _ in 0..dice.below(4) {
                let Some(mut frame) = ends[me].speak(now) else { break };
                let wire = &mut wires[me];
                let strikes = now < 1800 && (struck == 0 && now > 500 || dice.below(100) == 0);
                struck += u32::from(strikes && deed != Deed::Nothing);
                match deed {
                    Deed::Lose if strikes => continue,
                    Deed::Stop if now > 1000 => continue,
                    Deed::Repeat if strikes => wire.push(frame.clone()),
                    Deed::Flip if strikes => {
                        let at = 14 + dice.below(frame.len() as u64 - 14) as usize;
                        frame[at] ^= 1 << dice.below(8);
                    }
                    _ => {}
                }
                wire.push(frame);
                if deed == Deed::Swap && strikes && wire.len() > 1 {
                    let last = wire.len() - 1;
                    wire.swap(last, last - 1);
                }
            }
        }
        for me in 0..2 {
            for frame in wires[1 - me].drain(..) {
                ends[me].listen(&frame, now);
            }
        }
    }
    ends.map(|end| end.verdict(promise))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn each_deed_is_noticed_and_nothing_else(seed: u64) {
        for deed in [Deed::Nothing, Deed::Lose, Deed::Repeat, Deed::Swap, Deed::Flip, Deed::Stop] {
            let promise = Promise { silence_ms_max: 900, ..Promise::ALL };
            let verdicts = talk(seed, deed, &promise);
            let sum = |of: fn(&TalkVerdict) -> u64| verdicts.iter().map(of).sum::<u64>();
            let found = [
                (Deed::Lose, sum(|v| v.heard.lost)),
                (Deed::Repeat, sum(|v| v.heard.repeated)),
                (Deed::Swap, sum(|v| v.heard.reordered)),
                (Deed::Flip, sum(|v| v.heard.corrupted)),
            ];
            for (kind, count) in found {
                // A frame that was flipped is also missing.
                let may = kind == deed || (deed, kind) == (Deed::Flip, Deed::Lose);
                prop_assert!(may || count == 0, "{deed:?}: {kind:?} {count}");
                prop_assert!(kind != deed || deed == Deed::Swap || count > 0, "{deed:?} was not found");
            }
            let ok = verdicts.iter().all(|v| v.ok);
            prop_assert!(ok == (deed == Deed::Nothing) || deed == Deed::Swap, "{deed:?}: {}", verdicts[0].json());
            if deed == Deed::Nothing {
                prop_assert!(verdicts.iter().all(|v| v.heard.frames > 500), "{}", verdicts[0].json());
            }
        }
    }

    /// What is lost is told with its numbers and times.
    #[test]
    fn a_gap_has_a_place_and_a_time(seed: u64) {
        let verdicts = talk(seed, Deed::Lose, &Promise::ALL);
        let gaps: Vec<_> = verdicts.iter().flat_map(|v| &v.heard.gaps).collect();
        prop_assert!(gaps.iter().all(|gap| gap.count > 0 && gap.from_ms <= gap.to_ms && gap.to_ms < 4000), "{gaps:?}");
        prop_assert!(gaps.iter().any(|gap| gap.to_ms > 400));
    }
}
