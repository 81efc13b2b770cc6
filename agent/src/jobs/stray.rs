//! A look at another member's server, of which no agent tells.

use std::time::Duration;

use kornak_cluster::ClusterState;

use crate::context::Context;
use crate::ha::Stray;
use crate::postgres::SqlError;

/// Asks the server that another member's mark names whether it is a primary.
pub async fn look_at_stray(ctx: &Context, cluster: &ClusterState, limit: Duration) -> Stray {
    let mark = cluster.unfenced.as_ref().filter(|mark| mark.member != ctx.name);
    let Some(mark) = mark else { return Stray::Unheard };
    let member = || cluster.members.get(&mark.member)?.conn_address();
    let Some((host, port)) = mark.conn_address().or_else(member) else { return Stray::Unheard };
    match ctx.machine.timeout(limit, ctx.server.recovery_of(&host, port)).await {
        // Another server has the address, and tells nothing of the one that had it.
        Ok(Ok((_, Some(identifier)))) if identifier != mark.sysid => Stray::Unheard,
        Ok(Ok((Some(true), _))) => Stray::Standby,
        Ok(Ok(_)) => Stray::Runs,
        Ok(Err(SqlError::Refused)) => Stray::Refused,
        Ok(Err(SqlError::StartingUp | SqlError::ShuttingDown)) => Stray::Runs,
        Ok(Err(error)) if error.is_an_answer() => Stray::Runs,
        Ok(Err(_)) | Err(_) => Stray::Unheard,
    }
}
