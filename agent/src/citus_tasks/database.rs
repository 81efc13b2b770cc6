//! A database for Citus: made if it is not there, with the extension and what its nodes need to log in
//! to each other. Each statement may be repeated.

use kornak_config::agent::Credentials;
use secrecy::ExposeSecret;
use tokio_postgres::Client;
use tracing::info;

use crate::postgres::{Postgres, SqlError, ask, identifier, join_conninfo, literal};

/// `application_name` of connections for Citus' affairs, after `Kornak`; the gate of a handover does not
/// wait for them.
pub(super) const APPLICATION: &str = "citus";

/// The superuser's password must not be in any log: neither the server's nor an extension's.
const QUIETLY: [&str; 3] = [
    "SET log_statement TO none",
    "SET log_min_duration_statement TO -1",
    "SET log_min_error_statement TO panic",
];

/// Makes the database and the extension in it if they are not there. The server must be a primary.
pub(crate) async fn ensure(postgres: &Postgres, database: &str) -> Result<(), SqlError> {
    let any = postgres.sql();
    let exists = format!("SELECT 1 FROM pg_database WHERE datname = {}", literal(database));
    if any.query("look for the database of Citus", &exists).await?.is_empty() {
        let first = &postgres.settings().database;
        let client = postgres.connect_to_database(first, APPLICATION).await?;
        let create = format!("CREATE DATABASE {}", identifier(database));
        match ask(&client, "create the database of Citus", &create).await {
            // 42P04: somebody else was faster.
            Err(error) if error.code() != Some("42P04") => return Err(error),
            _ => info!(database, "database created"),
        }
    }
    let client = postgres.connect_to_database(database, APPLICATION).await?;
    let exists = "SELECT 1 FROM pg_extension WHERE extname = 'citus'";
    if ask(&client, "look for the extension", exists).await?.is_empty() {
        ask(&client, "create the extension", "CREATE EXTENSION IF NOT EXISTS citus").await?;
        info!(database, "extension citus created");
    }
    // What a session reads from is its own affair; the proxy's listener for standbys sets it for them.
    let grant = "GRANT SET ON PARAMETER citus.use_secondary_nodes TO PUBLIC";
    let granted = "SELECT 1 FROM pg_parameter_acl WHERE parname = 'citus.use_secondary_nodes'";
    if ask(&client, "look for a grant", granted).await?.is_empty() {
        ask(&client, "let sessions read from secondaries", grant).await?;
    }
    authenticate(&client, &postgres.settings().superuser).await
}

/// Restores the rows that a person may have removed. Does nothing where the database or the extension is gone.
pub(crate) async fn look_after(postgres: &Postgres, database: &str) -> Result<(), SqlError> {
    let client = match postgres.connect_to_database(database, APPLICATION).await {
        Err(error) if error.code() == Some("3D000") => return Ok(()),
        connected => connected?,
    };
    let exists = "SELECT 1 FROM pg_extension WHERE extname = 'citus'";
    if ask(&client, "look for the extension", exists).await?.is_empty() {
        return Ok(());
    }
    authenticate(&client, &postgres.settings().superuser).await
}

/// `pg_dist_authinfo`: how this node logs in to the others, as the superuser. Written when it differs,
/// so that a changed password takes effect.
async fn authenticate(client: &Client, superuser: &Credentials) -> Result<(), SqlError> {
    let path = |path: &std::path::PathBuf| path.display().to_string();
    let words: Vec<(&str, String)> = [
        ("password", superuser.password.as_ref().map(|word| word.expose_secret().to_owned())),
        ("sslcert", superuser.sslcert.as_ref().map(path)),
        ("sslkey", superuser.sslkey.as_ref().map(path)),
    ]
    .into_iter()
    .filter_map(|(word, value)| Some((word, value?)))
    .collect();
    if words.is_empty() {
        return Ok(());
    }
    for statement in QUIETLY {
        ask(client, "keep passwords out of logs", statement).await?;
    }
    let statement = format!(
        "INSERT INTO pg_catalog.pg_dist_authinfo VALUES (0, current_user, {}) \
         ON CONFLICT (nodeid, rolename) DO UPDATE SET authinfo = EXCLUDED.authinfo \
         WHERE pg_dist_authinfo.authinfo <> EXCLUDED.authinfo RETURNING 1",
        literal(&join_conninfo(&words))
    );
    let changed = ask(client, "write the superuser's login", &statement).await?;
    if !changed.is_empty() {
        info!("login of the superuser on other nodes noted in pg_dist_authinfo");
    }
    Ok(())
}
