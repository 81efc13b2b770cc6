//! JSON with the white space that Python puts into it, for people's scripts look for `"role": "primary"`.

use std::io;

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

pub(super) fn spaced(value: &Value) -> String {
    let mut out = Vec::with_capacity(1024);
    let printed = value.serialize(&mut Serializer::with_formatter(&mut out, Spaced));
    // Writing to memory cannot fail; without the spaces it is the same value.
    let spaced = printed.ok().and_then(|()| String::from_utf8(out).ok());
    spaced.unwrap_or_else(|| value.to_string())
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn there_is_a_space_after_commas_and_colons() {
        let value = json!({"a": [1, "x, y: z", {}], "b": {"c": null, "d": []}});
        let expected = r#"{"a": [1, "x, y: z", {}], "b": {"c": null, "d": []}}"#;
        assert_eq!(spaced(&value), expected);
    }
}
