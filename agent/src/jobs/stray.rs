//! A look at another member's server, of which no agent tells.

use std::time::Duration;

use kornak_cluster::ClusterState;
use tokio::time::timeout;

use crate::context::Context;
use crate::ha::Stray;
use crate::postgres::{SqlError, ask};

/// Asks the server that another member's mark names whether it is a primary.
pub async fn look_at_stray(ctx: &Context, cluster: &ClusterState, limit: Duration) -> Stray {
    let mark = cluster.unfenced.as_ref().filter(|mark| mark.member != ctx.name);
    let Some(mark) = mark else { return Stray::Unheard };
    let member = || cluster.members.get(&mark.member)?.conn_address();
    let Some((host, port)) = mark.conn_address().or_else(member) else { return Stray::Unheard };
    let database = &ctx.settings.postgresql.database;
    let look = async {
        let client = ctx.postgres.connect_to(&host, port, database, "look").await?;
        let statement = "SELECT pg_is_in_recovery(), system_identifier FROM pg_control_system()";
        ask(&client, "say whether it is a primary", statement).await
    };
    match timeout(limit, look).await {
        Ok(Ok(rows)) => match rows.first().map(Vec::as_slice) {
            // Another server has the address, and tells nothing of the one that had it.
            Some([_, Some(identifier)]) if *identifier != mark.sysid => Stray::Unheard,
            Some([Some(in_recovery), _]) if in_recovery == "t" => Stray::Standby,
            _ => Stray::Runs,
        },
        Ok(Err(SqlError::Refused)) => Stray::Refused,
        Ok(Err(SqlError::StartingUp | SqlError::ShuttingDown)) => Stray::Runs,
        Ok(Err(error)) if error.is_an_answer() => Stray::Runs,
        Ok(Err(_)) | Err(_) => Stray::Unheard,
    }
}
