//! `kornak show-config` and `kornak edit-config`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use kornak_cluster::config::{merge_patch, problems};
use kornak_cluster::{GroupId, discard};
use serde_json::{Map, Value};

use crate::diff;
use crate::output::{confirm, say};
use crate::render;
use crate::target::{Global, Target};

#[derive(Debug, Args)]
pub struct ShowArgs {
    cluster_name: Option<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
}

#[derive(Debug, Args)]
pub struct EditArgs {
    cluster_name: Option<String>,
    #[arg(long, value_parser = super::group)]
    group: Option<GroupId>,
    /// Do not show what changes.
    #[arg(short, long)]
    quiet: bool,
    /// Set a key, such as ttl=20 or postgresql.use_slots=false; null deletes it.
    #[arg(short, long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Set a parameter of PostgreSQL, such as work_mem=64MB; null deletes it.
    #[arg(short, long, value_name = "NAME=VALUE")]
    pg: Vec<String>,
    /// Merge a YAML file into the configuration; - is standard input.
    #[arg(long, value_name = "FILE")]
    apply: Option<PathBuf>,
    /// Take a YAML file as the whole configuration; - is standard input.
    #[arg(long, value_name = "FILE")]
    replace: Option<PathBuf>,
    /// Ask nothing.
    #[arg(long)]
    force: bool,
}

/// Prints the dynamic configuration as YAML.
///
/// # Errors
/// The cluster cannot be found or read.
pub async fn show(global: &Global, args: &ShowArgs) -> anyhow::Result<()> {
    let target = Target::find(global, args.cluster_name.as_deref())?;
    let group = target.read_one(args.group.or(target.own_group)).await?;
    if let Some(config) = group.config {
        // With an empty line at the end, as patronictl.
        say(&(render::yaml(&Value::Object(config)) + "\n"));
    }
    Ok(())
}

/// Changes the dynamic configuration: by options, by a file, or in an editor.
///
/// # Errors
/// The change makes no sense, was refused, or somebody else was faster.
pub async fn edit(global: &Global, args: EditArgs) -> anyhow::Result<()> {
    let target = Target::find(global, args.cluster_name.as_deref())?;
    let group = target.read_one(args.group.or(target.own_group)).await?;
    let before = match group.config.clone() {
        Some(before) => before,
        // The way back from a value that nobody can read.
        None if !group.config_revision.is_none() && args.replace.is_some() => Map::new(),
        None if !group.config_revision.is_none() => bail!(
            "The config key of the cluster {} makes no sense; write it again with --replace FILE",
            target.name
        ),
        None => bail!("The config key does not exist in the cluster {}", target.name),
    };
    let old_text = render::yaml(&Value::Object(before.clone()));
    let mut after = before.clone();
    let from_options = args.apply.is_some()
        || args.replace.is_some()
        || !args.set.is_empty()
        || !args.pg.is_empty();
    if let Some(file) = &args.replace {
        after = Map::new();
        merge_patch(&mut after, &read_yaml(file)?);
    }
    if let Some(file) = &args.apply {
        merge_patch(&mut after, &read_yaml(file)?);
    }
    if !from_options {
        after = in_editor(&old_text)?;
    }
    for setting in &args.set {
        set(&mut after, setting, &[])?;
    }
    for setting in &args.pg {
        set(&mut after, setting, &["postgresql", "parameters"])?;
    }
    let known = problems(&before);
    if let Some(problem) = problems(&after).into_iter().find(|problem| !known.contains(problem)) {
        bail!("{problem}");
    }
    let new_text = render::yaml(&Value::Object(after.clone()));
    if before == after {
        if !args.quiet {
            say("Not changed");
        }
        return Ok(());
    }
    if !args.quiet {
        say(&diff::unified(&old_text, &new_text));
    }
    let from_input = [&args.apply, &args.replace].into_iter().flatten();
    if !args.force && from_input.into_iter().any(|file| file.as_os_str() == "-") {
        say("Use --force option to apply changes");
        return Ok(());
    }
    if !args.force && !confirm("Apply these changes?")? {
        return Ok(());
    }
    target.replace_config(&group, &after).await?;
    say("Configuration changed");
    Ok(())
}

fn read_yaml(file: &PathBuf) -> anyhow::Result<Map<String, Value>> {
    let text = if file.as_os_str() == "-" {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(file)
    };
    let text = text.with_context(|| format!("read {}", file.display()))?;
    parse(&text).with_context(|| file.display().to_string())
}

fn parse(text: &str) -> anyhow::Result<Map<String, Value>> {
    match kornak_config::parse_yaml(text).map_err(|problem| anyhow!("{problem}"))? {
        Value::Object(map) => Ok(map),
        _ => bail!("expected keys and values"),
    }
}

/// `a.b.c=value` into a configuration; null deletes, and what is empty then goes too. Below
/// `postgresql.parameters` the rest is one key, for parameters of extensions have dots.
fn set(config: &mut Map<String, Value>, setting: &str, below: &[&str]) -> anyhow::Result<()> {
    let (key, value) =
        setting.split_once('=').ok_or_else(|| anyhow!("Invalid parameter setting {setting}"))?;
    let value = kornak_config::parse_yaml(value).unwrap_or_else(|_| Value::from(value));
    let path: Vec<&str> = below.iter().copied().chain(key.trim().split('.')).collect();
    set_below(config, &path, value, 0, true);
    Ok(())
}

fn set_below(
    config: &mut Map<String, Value>,
    path: &[&str],
    value: Value,
    depth: usize,
    maybe_parameter: bool,
) {
    let joined;
    let (key, rest) = match path {
        rest if maybe_parameter && depth == 2 => {
            joined = rest.join(".");
            (joined.as_str(), &[][..])
        }
        [key, rest @ ..] => (*key, rest),
        [] => return,
    };
    let expected = ["postgresql", "parameters"].get(depth);
    if rest.is_empty() {
        if value.is_null() {
            config.shift_remove(key);
        } else {
            config.insert(key.to_owned(), value);
        }
        return;
    }
    let inner = config.entry(key).or_insert_with(|| Value::Object(Map::new()));
    if !inner.is_object() {
        *inner = Value::Object(Map::new());
    }
    let Value::Object(inner) = inner else { return };
    set_below(inner, rest, value, depth + 1, maybe_parameter && expected == Some(&key));
    if inner.is_empty() {
        config.shift_remove(key);
    }
}

fn in_editor(text: &str) -> anyhow::Result<Map<String, Value>> {
    let named = |name: &&str| std::env::var(name).ok().filter(|named| !named.trim().is_empty());
    let editor = ["EDITOR", "VISUAL"].iter().find_map(named);
    let editor =
        editor.unwrap_or_else(|| if is_installed("editor") { "editor" } else { "vi" }.into());
    let name = format!("kornak-config-{:08x}.yaml", rand::random::<u32>());
    let path = std::env::temp_dir().join(name);
    let edited = edit_file(&editor, &path, text);
    // Without the file there is nothing to remove.
    discard::may_be_gone_already(std::fs::remove_file(&path));
    parse(&edited?)
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn edit_file(editor: &str, path: &std::path::Path, text: &str) -> anyhow::Result<String> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{text}")?;
    drop(file);
    let mut words = editor.split_whitespace();
    let program = words.next().unwrap_or("vi");
    let status = std::process::Command::new(program).args(words).arg(path).status();
    let status = status.with_context(|| format!("start the editor {program}; set EDITOR"))?;
    if !status.success() {
        let code = status.code().unwrap_or(-1);
        bail!("Editor exited with return code {code}");
    }
    Ok(std::fs::read_to_string(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_typed_and_null_deletes() {
        for (setting, below, expected) in [
            ("ttl=20", &[][..], r#"{"ttl":20,"a":{"b":1}}"#),
            ("a.b=null", &[], r#"{"ttl":30}"#),
            ("a.c=on", &[], r#"{"ttl":30,"a":{"b":1,"c":true}}"#),
            (
                "x.y=64MB",
                &["postgresql", "parameters"],
                r#"{"ttl":30,"a":{"b":1},"postgresql":{"parameters":{"x.y":"64MB"}}}"#,
            ),
            (
                "postgresql.parameters.c.d=1",
                &[],
                r#"{"ttl":30,"a":{"b":1},"postgresql":{"parameters":{"c.d":1}}}"#,
            ),
            ("ttl.x=1", &[], r#"{"ttl":{"x":1},"a":{"b":1}}"#),
            ("n==1", &[], r#"{"ttl":30,"a":{"b":1},"n":"=1"}"#),
        ] {
            let mut config = parse("{ttl: 30, a: {b: 1}}").unwrap();
            set(&mut config, setting, below).unwrap();
            assert_eq!(Value::Object(config).to_string(), expected, "{setting}");
        }
        assert!(set(&mut Map::new(), "ttl", &[]).is_err());
    }
}
