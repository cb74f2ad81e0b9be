//! Which scenarios run, and in which machines: a machine has one processor, so a host with more runs several machines.

use anyhow::{Result, bail, ensure};

use crate::inside::{Scenario, When};

/// Machines, by the names of their scenarios.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// Those that run at the same time.
    pub together: Vec<Vec<String>>,
    /// What then runs by itself.
    pub alone: Vec<String>,
}

/// The scenarios that are asked for: by name, or the short set, or all.
///
/// # Errors
/// When there is none of a name.
pub fn chosen(known: &[Scenario], only: &[String], all: bool) -> Result<Vec<Scenario>> {
    if only.is_empty() {
        return Ok(known
            .iter()
            .filter(|scenario| all || matches!(scenario.when, When::Tested | When::Always))
            .copied()
            .collect());
    }
    let find = |name: &String| match known.iter().find(|scenario| scenario.name == name) {
        Some(scenario) => Ok(*scenario),
        None => bail!("there is no scenario {name}: --list names them"),
    };
    only.iter().map(find).collect()
}

/// Spreads scenarios over so many machines, each about as long at work as the others.
///
/// # Errors
/// When there are to be no machines.
pub fn schedule(chosen: &[Scenario], machines: usize) -> Result<Schedule> {
    ensure!(machines > 0, "no machine runs no scenario: --machines=1 is the least");
    let (alone, mut rest): (Vec<Scenario>, Vec<Scenario>) =
        chosen.iter().partition(|scenario| scenario.when == When::Alone);
    // The longest first, each to the machine that has least to do.
    rest.sort_by_key(|scenario| std::cmp::Reverse(scenario.seconds));
    let mut loads: Vec<(u32, Vec<String>)> = vec![(0, Vec::new()); machines.min(rest.len())];
    for scenario in rest {
        if let Some((load, names)) = loads.iter_mut().min_by_key(|(load, _)| *load) {
            *load += scenario.seconds;
            names.push(scenario.name.to_owned());
        }
    }
    let together = loads.into_iter().map(|(_, names)| names).collect();
    Ok(Schedule { together, alone: alone.iter().map(|scenario| scenario.name.to_owned()).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inside::scenarios;

    /// Whatever is chosen runs exactly once, and what measures runs by itself.
    #[test]
    fn everything_runs_once() -> Result<()> {
        let known = scenarios("all")?;
        for (all, machines) in [(false, 1), (false, 2), (true, 2), (true, 100)] {
            let chosen = chosen(&known, &[], all)?;
            let Schedule { together, alone } = schedule(&chosen, machines)?;
            let mut names: Vec<String> = together.iter().flatten().chain(&alone).cloned().collect();
            let mut expected: Vec<String> = chosen.iter().map(|scenario| scenario.name.to_owned()).collect();
            names.sort();
            expected.sort();
            assert_eq!(names, expected);
            assert!(together.iter().all(|names| !names.is_empty()) && together.len() <= machines);
            assert_eq!(alone.is_empty(), !all);
        }
        Ok(())
    }

    #[test]
    fn names_are_known_and_unique() -> Result<()> {
        let known = scenarios("all")?;
        let names: std::collections::BTreeSet<&str> = known.iter().map(|scenario| scenario.name).collect();
        assert_eq!(names.len(), known.len());
        assert!(chosen(&known, &["no-such".to_owned()], false).is_err());
        assert!(schedule(&known, 0).is_err());
        Ok(())
    }
}
