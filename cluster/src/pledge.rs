//! The promise of a synchronous standby to acknowledge nothing more to a leader that seems lost.

use serde::{Deserialize, Serialize};

use crate::epoch::Epoch;
use crate::lsn::{Lsn, Timeline};
use crate::numbers::Revision;

/// A term of leadership during which `sync` said the same: inside it whom commits wait for is known well enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Leadership {
    pub epoch: Epoch,
    /// `mod_revision` of `sync`.
    pub sync: Revision,
}

/// Value of `kornak/fence/<member>`: this member's server streams from nobody, and will not stream from this
/// leadership's leader again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pledge {
    /// Version of the format, [`crate::member::KORNAK_RECORDS_VERSION`].
    pub v: u32,
    #[serde(flatten)]
    pub of: Leadership,
    pub timeline: Timeline,
    /// The end of what is flushed there, read after the stream had ended.
    pub position: Lsn,
    /// The member follows again, or may.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub withdrawn: bool,
}

/// A member's key below `kornak/fence/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pledged {
    /// `None`: the value makes no sense.
    pub pledge: Option<Pledge>,
    /// `mod_revision` of the key.
    pub revision: Revision,
}

impl Pledged {
    /// The promise, if it is one for this leadership and holds.
    pub fn to(&self, of: Leadership) -> Option<Pledge> {
        self.pledge.filter(|pledge| {
            pledge.v == crate::member::KORNAK_RECORDS_VERSION
                && pledge.of == of
                && !pledge.withdrawn
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pledge_counts_for_its_own_leadership_until_it_is_withdrawn() {
        let of =
            Leadership { epoch: Epoch { store: 9, revision: Revision(50) }, sync: Revision(60) };
        let pledge =
            Pledge { v: 1, of, timeline: Timeline(3), position: Lsn(1000), withdrawn: false };
        let text = serde_json::to_string(&pledge).unwrap();
        assert_eq!(
            text,
            r#"{"v":1,"epoch":{"store":9,"revision":50},"sync":60,"timeline":3,"position":1000}"#
        );
        assert_eq!(serde_json::from_str::<Pledge>(&text).unwrap(), pledge);
        let found = |pledge| Pledged { pledge, revision: Revision(70) };
        assert_eq!(found(Some(pledge)).to(of), Some(pledge));
        let later = Leadership { sync: Revision(61), ..of };
        assert_eq!(found(Some(pledge)).to(later), None);
        assert_eq!(found(Some(Pledge { withdrawn: true, ..pledge })).to(of), None);
        assert_eq!(found(Some(Pledge { v: 2, ..pledge })).to(of), None);
        assert_eq!(found(None).to(of), None);
    }
}
