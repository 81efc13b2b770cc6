//! Values of PostgreSQL's parameters (/docs/current/config-setting.html#CONFIG-SETTING-NAMES-VALUES): a
//! server tells them in a unit of its own, an operator writes them in any.

/// The kind of a parameter, as `pg_settings` tells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind<'a> {
    /// `bool`, `integer`, `real`, `enum` or `string`.
    pub(super) vartype: &'a str,
    /// Such as `8kB` or `ms`.
    pub(super) unit: Option<&'a str>,
}

/// Units of memory in bytes and of time in microseconds, the largest first.
const MEMORY: [(&str, f64); 5] =
    [("TB", TERA), ("GB", 1_073_741_824.0), ("MB", 1_048_576.0), ("kB", 1024.0), ("B", 1.0)];
const TERA: f64 = 1_099_511_627_776.0;
const TIME: [(&str, f64); 6] =
    [("d", 86.4e9), ("h", 3.6e9), ("min", 6e7), ("s", 1e6), ("ms", 1e3), ("us", 1.0)];

impl Kind<'_> {
    /// Whether what is written means what the server tells.
    pub(super) fn same(self, told: &str, written: &str) -> bool {
        let equal = match self.vartype {
            "bool" => truth(told).zip(truth(written)).map(|(a, b)| a == b),
            "integer" => self.number(told, false).zip(self.number(written, true)).map(|(a, b)| {
                // A fraction of the unit is rounded.
                a == b.round()
            }),
            "real" => self.number(told, false).zip(self.number(written, true)).map(|(a, b)| a == b),
            "enum" => Some(told.eq_ignore_ascii_case(written)),
            _ => None,
        };
        equal.unwrap_or(told == written)
    }

    /// The value that the server shows, in the largest unit that says it without a fraction.
    pub(super) fn shown(self, told: &str) -> String {
        let largest = || {
            let value: i64 = told.parse().ok().filter(|value| *value > 0)?;
            let (table, base) = self.base()?;
            let whole = value as f64 * base;
            let (unit, size) = table.iter().find(|(_, size)| whole % size == 0.0)?;
            Some(format!("{}{unit}", whole / size))
        };
        match self.vartype {
            "integer" => largest().unwrap_or_else(|| told.to_owned()),
            _ => told.to_owned(),
        }
    }

    /// A number in the parameter's unit. `any_unit`: one may be written behind it.
    fn number(self, text: &str, any_unit: bool) -> Option<f64> {
        let text = text.trim();
        let digits = |c: char| c.is_ascii_digit() || "+-.eE".contains(c);
        let split = text.find(|c| !digits(c)).unwrap_or(text.len());
        let (value, unit) = text.split_at(split);
        let value: f64 = value.parse().ok()?;
        let unit = unit.trim();
        if unit.is_empty() {
            return Some(value);
        }
        let (table, base) = self.base().filter(|_| any_unit)?;
        let (_, size) = table.iter().find(|(name, _)| *name == unit)?;
        Some(value * size / base)
    }

    /// Of the parameter's own unit: the table that it is in, and its size there.
    fn base(self) -> Option<(&'static [(&'static str, f64)], f64)> {
        let unit = self.unit?;
        let split = unit.find(|c: char| !c.is_ascii_digit())?;
        let (count, name) = unit.split_at(split);
        let count: f64 = if count.is_empty() { 1.0 } else { count.parse().ok()? };
        let tables: [&'static [(&'static str, f64)]; 2] = [&MEMORY, &TIME];
        tables.into_iter().find_map(|table| {
            let (_, size) = table.iter().find(|(known, _)| *known == name)?;
            Some((table, count * size))
        })
    }
}

fn truth(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "on" | "true" | "yes" | "1" | "t" | "y" => Some(true),
        "off" | "false" | "no" | "0" | "f" | "n" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_compared_in_the_parameters_unit() {
        for (vartype, unit, told, written, same) in [
            ("integer", Some("8kB"), "16384", "128MB", true),
            ("integer", Some("8kB"), "16384", "0.125GB", true),
            ("integer", Some("8kB"), "16384", "16384", true),
            ("integer", Some("8kB"), "16384", "64MB", false),
            ("integer", Some("8kB"), "16384", "128 mb", false),
            ("integer", Some("kB"), "4098", "4097.5kB", true),
            ("integer", Some("MB"), "1048576", "1TB", true),
            ("integer", Some("s"), "300", "5min", true),
            ("integer", Some("ms"), "60000", "1min", true),
            ("integer", Some("ms"), "60000", "1MB", false),
            ("integer", None, "100", "100", true),
            ("integer", None, "100", " 0100 ", true),
            ("integer", None, "100", "100kB", false),
            ("real", Some("ms"), "0.5", "500us", true),
            ("real", None, "0.9", ".90", true),
            ("bool", None, "on", "True", true),
            ("bool", None, "off", "on", false),
            ("enum", None, "logical", "LOGICAL", true),
            ("string", None, "a", "A", false),
            ("string", None, "*", "*", true),
        ] {
            let kind = Kind { vartype, unit };
            assert_eq!(kind.same(told, written), same, "{vartype} {unit:?} {told} {written}");
        }
    }

    #[test]
    fn what_the_server_tells_is_shown_as_people_write_it() {
        for (vartype, unit, told, shown) in [
            ("integer", Some("8kB"), "16384", "128MB"),
            ("integer", Some("kB"), "1025", "1025kB"),
            ("integer", Some("min"), "1440", "1d"),
            ("integer", Some("ms"), "-1", "-1"),
            ("integer", Some("s"), "0", "0"),
            ("integer", None, "100", "100"),
            ("bool", None, "on", "on"),
        ] {
            assert_eq!(Kind { vartype, unit }.shown(told), shown, "{told} {unit:?}");
        }
    }
}
