//! libpq's password file (/docs/current/libpq-pgpass.html).

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use secrecy::SecretString;

use crate::output::complain;

/// Looks a login up in the password file; PGPASSFILE names the file, else it is `~/.pgpass`.
pub(super) fn look_up(login: [&str; 4]) -> Option<SecretString> {
    let named = std::env::var_os("PGPASSFILE").filter(|path| !path.is_empty()).map(PathBuf::from);
    let path = named.or_else(|| Some(std::env::home_dir()?.join(".pgpass")))?;
    let about = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
    if about.permissions().mode() & 0o077 != 0 {
        complain(&format!(
            "WARNING: password file \"{}\" has group or world access; permissions should be u=rw \
             (0600) or less",
            path.display()
        ));
        return None;
    }
    password(&std::fs::read_to_string(&path).ok()?, login).map(SecretString::from)
}

/// The password of the first line that fits host, port, database and user.
fn password(text: &str, login: [&str; 4]) -> Option<String> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = fields(line);
        let (asked, rest) = fields.split_at_checked(login.len())?;
        let fits = |(found, wanted): (&(String, bool), &str)| {
            let (word, escaped) = found;
            (word == "*" && !escaped) || word == wanted
        };
        let all = asked.iter().zip(login).all(fits);
        rest.first().filter(|(word, _)| all && !word.is_empty()).map(|(word, _)| word.clone())
    })
}

/// Five at most, each with whether a backslash is in it: an escaped asterisk is a name.
fn fields(line: &str) -> Vec<(String, bool)> {
    let mut fields = vec![(String::new(), false)];
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        let last = fields.len() == 5;
        let Some((field, escaped)) = fields.last_mut() else { break };
        match letter {
            '\\' => {
                *escaped = true;
                field.extend(letters.next());
            }
            // What follows the password is of no interest.
            ':' if last => break,
            ':' => fields.push((String::new(), false)),
            letter => field.push(letter),
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_fits_has_the_password() {
        let file = "# a comment\n\
                    nonsense\n\
                    a:5432:db:u:first\n\
                    a:*:*:u:any\\:thing\\\\:else\n\
                    \\*:1:db:u:star\n\
                    *:1:db:u:late\n\
                    e:1:db:u:\n\
                    \\:\\:1:1:db:u:six\n";
        for (login, expected) in [
            (["a", "5432", "db", "u"], Some("first")),
            (["a", "5433", "db", "u"], Some("any:thing\\")),
            (["a", "5432", "db", "v"], None),
            (["*", "1", "db", "u"], Some("star")),
            (["b", "1", "db", "u"], Some("late")),
            (["::1", "1", "db", "u"], Some("late")),
            (["c", "2", "db", "u"], None),
        ] {
            assert_eq!(password(file, login).as_deref(), expected, "{login:?}");
        }
        let six = file.replace("*:1:db:u:late\n", "");
        assert_eq!(password(&six, ["::1", "1", "db", "u"]).as_deref(), Some("six"));
        assert_eq!(password(&six, ["e", "1", "db", "u"]), None, "an empty one is none");
    }
}
