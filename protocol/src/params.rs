//! The parameters that a server reports (ParameterStatus), as a set, and what differs between
//! two of them.
//!
//! A session that moves to another server has been told the parameters of the old one; what the
//! new one reports otherwise has to be told, or set back. Values are bytes in the session's
//! encoding. `/docs/current/protocol-flow.html#PROTOCOL-ASYNC`.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use crate::backend::put_parameter_status;
use crate::limits::MAX_PARAMETERS;
use crate::wire::EncodeError;

/// Reported parameters by name. Names keep the server's spelling (`TimeZone`, `DateStyle`) and
/// are compared without regard to ASCII case, as PostgreSQL does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Lower-case name → (name as reported, value).
    by_name: BTreeMap<Box<[u8]>, (Bytes, Bytes)>,
}

/// The set holds [`MAX_PARAMETERS`] names and another one came: no server of ours does that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("server reports more than {MAX_PARAMETERS} parameters")]
pub struct TooManyParameters;

impl Parameters {
    /// Takes a report in. Answers whether it changed anything.
    pub fn set(&mut self, name: &[u8], value: &[u8]) -> Result<bool, TooManyParameters> {
        let key = name.to_ascii_lowercase().into_boxed_slice();
        if let Some((_, known)) = self.by_name.get_mut(&key) {
            let changed = known != value;
            if changed {
                *known = Bytes::copy_from_slice(value);
            }
            return Ok(changed);
        }
        if self.by_name.len() >= MAX_PARAMETERS {
            return Err(TooManyParameters);
        }
        let entry = (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value));
        self.by_name.insert(key, entry);
        Ok(true)
    }

    /// A parameter's value.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let key = name.to_ascii_lowercase();
        self.by_name.get(key.as_bytes()).map(|(_, value)| value.as_ref())
    }

    /// Names and values, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.by_name.values().map(|(name, value)| (name.as_ref(), value.as_ref()))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Parameters to report so that a client that knows `self` knows `newer`: new names and changed
    /// values. A name that `newer` lacks is not reported; a server cannot take one back.
    pub fn diff<'a>(&'a self, newer: &'a Self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        newer.by_name.iter().filter_map(|(key, (name, value))| {
            let same = self.by_name.get(key).is_some_and(|(_, known)| known == value);
            (!same).then_some((name.as_ref(), value.as_ref()))
        })
    }

    /// Whether the server is a standby, if it says so (PostgreSQL 14 and newer).
    pub fn in_hot_standby(&self) -> Option<bool> {
        match self.get("in_hot_standby")? {
            b"on" => Some(true),
            b"off" => Some(false),
            _ => None,
        }
    }

    /// Appends a ParameterStatus for each.
    pub fn put(&self, out: &mut BytesMut) -> Result<(), EncodeError> {
        self.iter().try_for_each(|(name, value)| put_parameter_status(name, value, out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::parameter_status;
    use crate::frame::take_frame;

    fn of(pairs: &[(&str, &str)]) -> Parameters {
        let mut set = Parameters::default();
        for (name, value) in pairs {
            set.set(name.as_bytes(), value.as_bytes()).unwrap();
        }
        set
    }

    #[test]
    fn names_are_compared_without_case_and_kept_as_spelled() {
        let mut set = of(&[("TimeZone", "UTC")]);
        assert_eq!(set.set(b"timezone", b"UTC"), Ok(false));
        assert_eq!(set.set(b"TIMEZONE", b"Europe/Berlin"), Ok(true));
        assert_eq!(set.get("TimeZone"), Some(&b"Europe/Berlin"[..]));
        assert_eq!(set.iter().next(), Some((&b"TimeZone"[..], &b"Europe/Berlin"[..])));
        assert_eq!(set.len(), 1);
    }

    #[test]
    fn a_diff_is_what_has_to_be_told() {
        let old = of(&[("a", "1"), ("b", "2"), ("gone", "x")]);
        let new = of(&[("a", "1"), ("b", "3"), ("c", "4")]);
        let told: Vec<_> = old.diff(&new).collect();
        assert_eq!(told, [(&b"b"[..], &b"3"[..]), (&b"c"[..], &b"4"[..])]);
        assert_eq!(new.diff(&new).count(), 0);
    }

    #[test]
    fn a_flood_of_names_is_refused() {
        let mut set = Parameters::default();
        for n in 0..MAX_PARAMETERS {
            set.set(format!("p{n}").as_bytes(), b"").unwrap();
        }
        assert_eq!(set.set(b"one more", b""), Err(TooManyParameters));
        assert_eq!(set.set(b"p0", b"x"), Ok(true), "known names still change");
    }

    #[test]
    fn a_set_is_told_message_by_message() {
        let set = of(&[("in_hot_standby", "on"), ("server_version", "15.9")]);
        assert_eq!(set.in_hot_standby(), Some(true));
        let mut out = BytesMut::new();
        set.put(&mut out).unwrap();
        let mut back = Parameters::default();
        while let Some(frame) = take_frame(&mut out, 1024).unwrap() {
            let (name, value) = parameter_status(&frame.body).unwrap();
            back.set(name, value).unwrap();
        }
        assert_eq!(back, set);
    }
}
