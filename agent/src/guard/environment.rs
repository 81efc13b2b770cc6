//! The environment of child processes.

use std::ffi::OsStr;

use tokio::process::Command;

/// Takes Patroni's variables out of a child's environment, as Patroni does, for there are passwords in
/// them; and systemd's, to which a server would tell that it is ready or stops.
pub(crate) fn hide_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if is_setting(&name) {
            command.env_remove(name);
        }
    }
}

fn is_setting(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"PATRONI_") || name == "NOTIFY_SOCKET"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patronis_variables_are_not_for_children() {
        for (name, hidden) in [
            ("PATRONI_SUPERUSER_PASSWORD", true),
            ("PATRONI_", true),
            ("NOTIFY_SOCKET", true),
            ("PATRONICTL_CONFIG_FILE", false),
            ("PGSSLMODE", false),
        ] {
            assert_eq!(is_setting(OsStr::new(name)), hidden, "{name}");
        }
    }
}
