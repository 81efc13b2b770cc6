//! `kornak show-config` and `kornak edit-config`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use kornak_cluster::GroupId;
use kornak_cluster::config::merge_patch;
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
    #[arg(long, value_name = "FILE", conflicts_with = "apply")]
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
    let config = group.config.ok_or_else(|| anyhow!("the cluster has no configuration yet"))?;
    say(&render::yaml(&Value::Object(config)));
    Ok(())
}

/// Changes the dynamic configuration: by options, by a file, or in an editor.
///
/// # Errors
/// The change makes no sense, was refused, or somebody else was faster.
pub async fn edit(global: &Global, args: EditArgs) -> anyhow::Result<()> {
    let target = Target::find(global, args.cluster_name.as_deref())?;
    let group = target.read_one(args.group.or(target.own_group)).await?;
    let before = group.config.clone();
    let before = before.ok_or_else(|| anyhow!("the cluster has no configuration yet"))?;
    let old_text = render::yaml(&Value::Object(before.clone()));
    let mut after = before.clone();
    let from_options = args.apply.is_some()
        || args.replace.is_some()
        || !args.set.is_empty()
        || !args.pg.is_empty();
    if let Some(file) = &args.replace {
        after = read_yaml(file)?;
    } else if let Some(file) = &args.apply {
        merge_patch(&mut after, &read_yaml(file)?);
    } else if !from_options {
        after = in_editor(&old_text)?;
    }
    for setting in &args.set {
        set(&mut after, setting, &[])?;
    }
    for setting in &args.pg {
        set(&mut after, setting, &["postgresql", "parameters"])?;
    }
    let new_text = render::yaml(&Value::Object(after.clone()));
    if old_text == new_text {
        say("Not changed");
        return Ok(());
    }
    if !args.quiet {
        say(&diff::unified(&old_text, &new_text));
    }
    if !args.force && !confirm("Apply these changes?")? {
        bail!("Aborted: the configuration was not changed");
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

/// `a.b.c=value` into a configuration. In `--pg` the whole name is one key, for parameters of
/// extensions have dots.
fn set(config: &mut Map<String, Value>, setting: &str, below: &[&str]) -> anyhow::Result<()> {
    let (key, value) =
        setting.split_once('=').ok_or_else(|| anyhow!("expected key=value, found {setting:?}"))?;
    let value = kornak_config::parse_yaml(value).unwrap_or_else(|_| Value::from(value));
    let keys: Vec<&str> = if below.is_empty() { key.split('.').collect() } else { vec![key] };
    let path = below.iter().copied().chain(keys).map(str::trim);
    let path: Vec<&str> = path.collect();
    let patch = path
        .iter()
        .rev()
        .fold(value, |inner, key| Value::Object(Map::from_iter([((*key).to_owned(), inner)])));
    if let Value::Object(patch) = patch {
        merge_patch(config, &patch);
    }
    Ok(())
}

fn in_editor(text: &str) -> anyhow::Result<Map<String, Value>> {
    let editor = ["VISUAL", "EDITOR"].iter().find_map(|name| std::env::var(name).ok());
    let editor =
        editor.filter(|editor| !editor.trim().is_empty()).unwrap_or_else(|| "vi".to_owned());
    let name = format!("kornak-config-{:08x}.yaml", rand::random::<u32>());
    let path = std::env::temp_dir().join(name);
    let edited = edit_file(&editor, &path, text);
    // Without the file there is nothing to remove.
    let _ = std::fs::remove_file(&path);
    parse(&edited?)
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
        bail!("the editor {program} failed; nothing was changed");
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
            ("a.b=null", &[], r#"{"ttl":30,"a":{}}"#),
            ("a.c=on", &[], r#"{"ttl":30,"a":{"b":1,"c":true}}"#),
            ("x.y=64MB", &["p"], r#"{"ttl":30,"a":{"b":1},"p":{"x.y":"64MB"}}"#),
            ("n==1", &["p"], r#"{"ttl":30,"a":{"b":1},"p":{"n":"=1"}}"#),
        ] {
            let mut config = parse("{ttl: 30, a: {b: 1}}").unwrap();
            set(&mut config, setting, below).unwrap();
            assert_eq!(Value::Object(config).to_string(), expected, "{setting}");
        }
        assert!(set(&mut Map::new(), "ttl", &[]).is_err());
    }
}
