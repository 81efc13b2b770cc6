//! Text to settings that cannot be wrong.
//!
//! An agent's file is Patroni's YAML; a proxy's file has the same head and a `proxy:` section. What
//! comes out is checked and complete, so no later code asks whether a value makes sense. Every
//! mistake of a file is reported at once, each with file, line, key and what was expected. Keys of
//! Patroni's that mean nothing here are named in one warning; below `kornak:` and `proxy:` an
//! unknown key is an error.
//!
//! Nothing here opens a socket, reads a clock or the environment: the environment is an argument.
//! Not here: the dynamic configuration in the store ([`kornak_cluster::ClusterConfig`]).

pub mod address;
pub mod agent;
pub mod ctl;
mod environment;
pub mod error;
pub mod log;
pub mod proxy;
mod read;
pub mod reload;
pub mod rules;
mod section;
pub mod store;
mod units;
mod yaml;

use std::path::{Path, PathBuf};

pub use address::{HostPort, Listen};
pub use agent::AgentSettings;
pub use ctl::OperatorSettings;
pub use error::{ConfigError, Finding, Place, Problem, Severity};
pub use log::{LogField, LogLevel, LogSettings, LogType};
pub use proxy::ProxySettings;
pub use store::{Etcd3Settings, Scheme, StoreSettings};

use section::Document;
use yaml::Tree;

/// The process's environment, given by the caller: names and values.
pub type Environment = [(String, String)];

/// Settings, and what the operator should be told about them.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    pub settings: T,
    /// One line each.
    pub warnings: Vec<String>,
}

/// Reads an agent's settings: a file, or a folder whose `*.yml` and `*.yaml` are merged in the
/// order of their names, or (`None`) the variable `PATRONI_CONFIGURATION`; Patroni's other
/// variables win over all of these.
pub fn load_agent(
    path: Option<&Path>,
    environment: &Environment,
) -> Result<Loaded<AgentSettings>, ConfigError> {
    let document = open(path, environment)?;
    let settings = read::agent::agent(&document.root());
    loaded(document, settings)
}

/// Reads a proxy's settings, from the same sources as [`load_agent`].
pub fn load_proxy(
    path: Option<&Path>,
    environment: &Environment,
) -> Result<Loaded<ProxySettings>, ConfigError> {
    let document = open(path, environment)?;
    let base = path.and_then(Path::parent).unwrap_or(Path::new(""));
    let settings = read::proxy::proxy(&document.root(), base);
    loaded(document, settings)
}

/// Reads what the operator's verbs need; a file without anything for them is fine.
pub fn load_operator(
    path: Option<&Path>,
    environment: &Environment,
) -> Result<OperatorSettings, ConfigError> {
    let document = open(path, environment)?;
    let settings = read::ctl::operator(&document.root());
    loaded(document, Some(settings)).map(|loaded| loaded.settings)
}

/// Reads one YAML value as this crate reads files: `on` is true, `0600` is octal.
///
/// # Errors
/// The mistake, with the line.
pub fn parse_yaml(text: &str) -> Result<serde_json::Value, Problem> {
    yaml::parse_strictly(text)
}

/// Which program a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Agent,
    Proxy,
}

/// Kind of a file: a proxy's has `proxy`, `static` or `rest`, and no `postgresql`.
pub fn kind(path: &Path) -> Result<Kind, ConfigError> {
    let tree = read_tree(path)?;
    let has = |key: &str| tree.root.contains_key(key);
    let proxy = has("proxy") || has("static") || has("rest");
    Ok(if proxy && !has("postgresql") { Kind::Proxy } else { Kind::Agent })
}

/// Everything that is wrong or odd about a file, whichever program it is for. Empty: it is fine.
pub fn check(path: &Path, environment: &Environment) -> Vec<Finding> {
    let result = kind(path).and_then(|kind| match kind {
        Kind::Agent => load_agent(Some(path), environment).map(|loaded| loaded.warnings),
        Kind::Proxy => load_proxy(Some(path), environment).map(|loaded| loaded.warnings),
    });
    let finding = |severity, text: String| Finding { severity, text };
    match result {
        Ok(warnings) => warnings.into_iter().map(|text| finding(Severity::Warning, text)).collect(),
        Err(ConfigError::Invalid(problems)) => {
            problems.iter().map(|problem| finding(Severity::Error, problem.to_string())).collect()
        }
        Err(ConfigError::Read { path, source }) => {
            vec![finding(Severity::Error, format!("{}: {source}", path.display()))]
        }
    }
}

fn loaded<T>(document: Document, settings: Option<T>) -> Result<Loaded<T>, ConfigError> {
    debug_assert!(settings.is_some() || !document.is_clean(), "refused without a reason");
    document.finish(settings).map(|(settings, warnings)| Loaded { settings, warnings })
}

fn open(path: Option<&Path>, environment: &Environment) -> Result<Document, ConfigError> {
    let (source, mut tree) = match path {
        Some(path) => (path.display().to_string(), read_tree(path)?),
        None => match environment::lookup(environment, environment::WHOLE) {
            Some(text) => (environment::WHOLE.to_owned(), parse(environment::WHOLE, text)?),
            None => ("environment".to_owned(), Tree::default()),
        },
    };
    let strays = environment::overlay(&mut tree, environment);
    let document = Document::new(&source, tree);
    document.strays(strays);
    Ok(document)
}

fn read_tree(path: &Path) -> Result<Tree, ConfigError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ConfigError::Read { path, source }
    };
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).map_err(failed(path))?;
        parse(&path.display().to_string(), &text)
    };
    if !path.is_dir() {
        return read(path);
    }
    let entries = std::fs::read_dir(path).map_err(failed(path))?;
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let file = entry.map_err(failed(path))?.path();
        let yaml = file.extension().is_some_and(|end| end == "yml" || end == "yaml");
        if yaml && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    let mut tree = Tree::default();
    for file in files {
        tree.merge(read(&file)?);
    }
    Ok(tree)
}

fn parse(source: &str, text: &str) -> Result<Tree, ConfigError> {
    Tree::parse(source, text).map_err(|problem| ConfigError::Invalid(vec![problem]))
}

#[cfg(test)]
mod tests;
