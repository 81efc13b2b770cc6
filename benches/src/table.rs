//! Medians and their table.

use std::fmt::Write as _;

/// The measurements: for each row and way the transactions per second of each round.
#[derive(Debug, Default)]
pub struct Table {
    ways: Vec<&'static str>,
    rows: Vec<(&'static str, Vec<Vec<f64>>)>,
}

impl Table {
    pub fn new(ways: Vec<&'static str>, rows: impl IntoIterator<Item = &'static str>) -> Self {
        let empty = vec![Vec::new(); ways.len()];
        Self { rows: rows.into_iter().map(|name| (name, empty.clone())).collect(), ways }
    }

    pub fn add(&mut self, row: usize, way: usize, tps: f64) {
        if let Some(cell) = self.rows.get_mut(row).and_then(|(_, cells)| cells.get_mut(way)) {
            cell.push(tps);
        }
    }

    /// One block for each row: median, spread of the rounds, ratio to the first way and to the
    /// second.
    pub fn render(&self) -> String {
        let mut out = String::new();
        for (row, cells) in &self.rows {
            let _ = writeln!(out, "{row}");
            let medians: Vec<Option<f64>> = cells.iter().map(|cell| median(cell)).collect();
            for ((way, cell), middle) in self.ways.iter().zip(cells).zip(&medians) {
                let Some(middle) = middle else {
                    let _ = writeln!(out, "  {way:<20}{:>11}", "cannot");
                    continue;
                };
                let spread = cell.iter().fold(0.0_f64, |most, tps| most.max((tps - middle).abs()));
                let ratio = |index: usize| match medians.get(index).copied().flatten() {
                    Some(base) if base > 0.0 => format!("{:.2}", middle / base),
                    _ => "-".to_owned(),
                };
                let _ = writeln!(
                    out,
                    "  {way:<20}{middle:>11.1} tps  ±{:>4.1} %   {:>5} of direct  {:>5} of HAProxy",
                    spread / middle * 100.0,
                    ratio(0),
                    ratio(1),
                );
            }
        }
        out
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get((sorted.len() - 1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_of_the_rounds() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn each_way_is_compared_with_the_first_two() {
        let mut table = Table::new(vec!["direct", "HAProxy", "Kornak"], ["work"]);
        for (way, tps) in [(0, 100.0), (1, 50.0), (2, 60.0)] {
            table.add(0, way, tps);
        }
        let text = table.render();
        assert!(text.contains("0.60 of direct"), "{text}");
        assert!(text.contains("1.20 of HAProxy"), "{text}");
    }
}
