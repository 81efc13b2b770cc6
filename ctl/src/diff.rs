//! Differences of two texts, in the form of `diff -u`. For configurations of some hundred
//! lines: the table below has one cell for each pair of lines.

use std::ops::Range;

/// Lines shown around a change.
const CONTEXT: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Edit {
    Keep,
    Remove,
    Add,
}

/// The hunks, without the last line end; empty if nothing changed.
pub fn unified(old: &str, new: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    let edits = edits(&old, &new);
    let mut lines = vec!["--- ".to_owned(), "+++ ".to_owned()];
    for hunk in hunks(&edits) {
        let before = edits.get(..hunk.start).unwrap_or_default();
        let inside = edits.get(hunk).unwrap_or_default();
        let count =
            |edits: &[Edit], other: Edit| edits.iter().filter(|edit| **edit != other).count();
        let (mut a, mut b) = (count(before, Edit::Add), count(before, Edit::Remove));
        lines.push(format!(
            "@@ -{} +{} @@",
            range(a, count(inside, Edit::Add)),
            range(b, count(inside, Edit::Remove))
        ));
        for edit in inside {
            let (mark, text) = match edit {
                Edit::Keep => (' ', old.get(a)),
                Edit::Remove => ('-', old.get(a)),
                Edit::Add => ('+', new.get(b)),
            };
            lines.push(format!("{mark}{}", text.copied().unwrap_or_default()));
            a += usize::from(*edit != Edit::Add);
            b += usize::from(*edit != Edit::Remove);
        }
    }
    if lines.len() == 2 { String::new() } else { lines.join("\n") }
}

/// A length of 1 is not written; no lines are after the one before.
fn range(start: usize, length: usize) -> String {
    match length {
        0 => format!("{start},0"),
        1 => format!("{}", start + 1),
        length => format!("{},{length}", start + 1),
    }
}

/// The shortest way from one to the other, by their longest common subsequence.
fn edits(old: &[&str], new: &[&str]) -> Vec<Edit> {
    let width = new.len() + 1;
    let mut common = vec![0_u32; (old.len() + 1) * width];
    let at = |common: &[u32], a: usize, b: usize| common.get(a * width + b).copied().unwrap_or(0);
    for (a, line) in old.iter().enumerate().rev() {
        for (b, other) in new.iter().enumerate().rev() {
            let best = if line == other {
                at(&common, a + 1, b + 1) + 1
            } else {
                at(&common, a + 1, b).max(at(&common, a, b + 1))
            };
            if let Some(cell) = common.get_mut(a * width + b) {
                *cell = best;
            }
        }
    }
    let (mut a, mut b, mut edits) = (0, 0, Vec::new());
    loop {
        match (old.get(a), new.get(b)) {
            (None, None) => return edits,
            (Some(line), Some(other)) if line == other => {
                edits.push(Edit::Keep);
                (a, b) = (a + 1, b + 1);
            }
            (Some(_), other)
                if other.is_none() || at(&common, a + 1, b) >= at(&common, a, b + 1) =>
            {
                edits.push(Edit::Remove);
                a += 1;
            }
            _ => {
                edits.push(Edit::Add);
                b += 1;
            }
        }
    }
}

/// Changes that are near each other, with their surroundings.
fn hunks(edits: &[Edit]) -> Vec<Range<usize>> {
    let mut hunks: Vec<Range<usize>> = Vec::new();
    let changes = edits.iter().enumerate().filter(|(_, edit)| **edit != Edit::Keep);
    for (index, _) in changes {
        let range = index.saturating_sub(CONTEXT)..(index + CONTEXT + 1).min(edits.len());
        match hunks.last_mut() {
            Some(last) if range.start <= last.end => last.end = range.end,
            _ => hunks.push(range),
        }
    }
    hunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_shown_with_their_surroundings() {
        let old = "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\nk";
        let new = "a\nB\nc\nd\ne\nf\ng\nh\ni\nj\nk\nl";
        assert_eq!(
            unified(old, new),
            "--- \n+++ \n@@ -1,5 +1,5 @@\n a\n-b\n+B\n c\n d\n e\n@@ -9,3 +9,4 @@\n i\n j\n k\n+l"
        );
        assert_eq!(unified(old, old), "");
        assert_eq!(unified("", "x"), "--- \n+++ \n@@ -0,0 +1 @@\n+x");
    }
}
