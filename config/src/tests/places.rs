//! Names of files and folders.

use std::path::Path;

use super::*;

#[test]
fn a_data_directory_is_meant_from_where_the_agent_runs_and_without_a_slash_at_its_end() {
    let here = std::env::current_dir().unwrap();
    for (written, meant) in [
        ("/data/pg0/", Path::new("/data/pg0").to_owned()),
        ("/data//pg0/.", Path::new("/data/pg0").to_owned()),
        ("data/pg0", here.join("data/pg0")),
        ("./pg0/", here.join("pg0")),
        // What is behind it may be a symbolic link.
        ("/data/a/../pg0", Path::new("/data/a/../pg0").to_owned()),
    ] {
        let text = changed(AGENT, "/data/pg0", written);
        let postgresql = agent(&text).settings.postgresql;
        assert_eq!(postgresql.data_dir, meant, "{written}");
        assert_eq!(postgresql.config_dir, meant, "{written}");
        assert!(!postgresql.data_dir.as_os_str().to_string_lossy().ends_with('/'), "{written}");
    }
}
