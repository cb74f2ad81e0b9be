//! Text for people: tables, sizes and rates.

/// Columns as wide as their widest cell, two spaces between them. The first row is the heading; columns named in `right`
/// stand at the right.
pub(crate) fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if right.contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A number of bytes: `512M`, `1.5G`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [(&str, u64); 4] = [("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)];
    match UNITS.iter().find(|(_, unit)| count >= *unit) {
        Some((name, unit)) if count.is_multiple_of(*unit) => format!("{}{name}", count / unit),
        Some((name, unit)) => format!("{:.1}{name}", count as f64 / *unit as f64),
        None => format!("{count}"),
    }
}

/// A number a second, in three digits or so.
pub(crate) fn rate(per_second: f64) -> String {
    match per_second {
        rate if rate >= 1e7 => format!("{:.0}M", rate / 1e6),
        rate if rate >= 1e6 => format!("{:.1}M", rate / 1e6),
        rate if rate >= 1e4 => format!("{:.0}k", rate / 1e3),
        rate if rate >= 1e3 => format!("{:.1}k", rate / 1e3),
        rate if rate >= 10.0 || rate == 0.0 => format!("{rate:.0}"),
        rate => format!("{rate:.1}"),
    }
}

/// A time in microseconds, in the unit that suits it.
pub(crate) fn time_us(us: f64) -> String {
    match us {
        us if us >= 1e6 => format!("{:.1} s", us / 1e6),
        us if us >= 1e4 => format!("{:.0} ms", us / 1e3),
        us if us >= 1e3 => format!("{:.1} ms", us / 1e3),
        us => format!("{us:.0} us"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown = [bytes(512 << 20), bytes(3 << 29), bytes(1), rate(0.0), rate(12_345.0), rate(1_500_000.0)];
        assert_eq!(shown, ["512M", "1.5G", "1", "0", "12k", "1.5M"]);
        assert_eq!([time_us(22.4), time_us(1234.0), time_us(2.5e6)], ["22 us", "1.2 ms", "2.5 s"]);
    }

    #[test]
    fn columns_line_up() {
        let rows = [["ID", "N"], ["disk", "10"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&rows, &[1]), "ID     N\ndisk  10\n");
    }
}
