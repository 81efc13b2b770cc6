//! A bordered table with a title laid over its upper border.

/// To which side of its cell a text goes; the column's name goes there too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// A table under construction.
#[derive(Debug, Clone)]
pub struct Table {
    title: String,
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without columns; the title may be empty.
    pub fn new(title: String) -> Self {
        Self { title, columns: Vec::new(), rows: Vec::new() }
    }

    pub fn column(&mut self, name: &str, align: Align) {
        self.columns.push((name.to_owned(), align));
    }

    /// One text per column; a text may have several lines.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The lines, without the last line end. Lines between all rows if any cell has several.
    pub fn print(&self) -> String {
        let widths = self.widths();
        let rule = self.rule(&widths);
        let several = self.rows.iter().flatten().any(|cell| cell.contains('\n'));
        let names: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let mut lines = vec![self.titled(&rule)];
        lines.extend(self.lines(&names, &widths));
        lines.push(rule.clone());
        for row in &self.rows {
            lines.extend(self.lines(row, &widths));
            if several {
                lines.push(rule.clone());
            }
        }
        if !several {
            lines.push(rule);
        }
        lines.join("\n")
    }

    fn widths(&self) -> Vec<usize> {
        let width = |(index, (name, _)): (usize, &(String, Align))| {
            let cells = self.rows.iter().filter_map(|row| row.get(index));
            let lines = cells.flat_map(|cell| cell.lines()).map(|line| line.chars().count());
            lines.max().unwrap_or_default().max(name.chars().count())
        };
        self.columns.iter().enumerate().map(width).collect()
    }

    fn rule(&self, widths: &[usize]) -> String {
        let parts: Vec<String> = widths.iter().map(|width| "-".repeat(width + 2)).collect();
        format!("+{}+", parts.join("+"))
    }

    /// The title over the rule, cut so that both corners stay.
    fn titled(&self, rule: &str) -> String {
        let room = rule.chars().count().saturating_sub(2);
        let title: String = self.title.chars().take(room).collect();
        let rest: String = rule.chars().skip(1 + title.chars().count()).collect();
        format!("+{title}{rest}")
    }

    fn lines(&self, cells: &[String], widths: &[usize]) -> Vec<String> {
        let height = cells.iter().map(|cell| cell.lines().count()).max().unwrap_or(1).max(1);
        let line = |index: usize| {
            let parts =
                self.columns.iter().zip(widths).zip(cells).map(|(((_, align), width), cell)| {
                    let text = cell.lines().nth(index).unwrap_or_default();
                    let space = " ".repeat(width.saturating_sub(text.chars().count()));
                    match align {
                        Align::Left => format!(" {text}{space} "),
                        Align::Right => format!(" {space}{text} "),
                    }
                });
            format!("|{}|", parts.collect::<Vec<_>>().join("|"))
        };
        (0..height).map(line).collect()
    }
}
