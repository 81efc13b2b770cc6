//! Nodes that show each other certificates.

use anyhow::Result;
use kornak_tests::run::citus::{CitusCluster, CitusSpec};

use super::{Loads, SOON, needs_citus, nothing_was_noticed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_verify_each_other_switch_over_unnoticed() -> Result<()> {
    needs_citus!();
    let members = vec![2, 2];
    let spec = CitusSpec { name: "citus-verify", members, verified: true, ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    let loads = Loads::start(&cluster).await?;
    for group in [1, 0] {
        cluster.switchover(group).await?;
        loads.flow(5).await;
    }
    let client = cluster.coordinator("citus").await?;
    let nodes = "SELECT bool_and(ssl AND client_dn = '/CN=citus'), count(*) \
        FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
        WHERE backend_type = 'walsender' OR application_name LIKE 'citus_%' \
           OR application_name LIKE 'Kornak %' AND client_addr IS NOT NULL";
    let row = client.query_one(nodes, &[]).await?;
    assert_eq!(row.get::<_, Option<bool>>(0), Some(true), "{} sessions", row.get::<_, i64>(1));
    cluster.healthy(SOON).await;
    nothing_was_noticed(&loads.stop(&cluster).await?);
    cluster.passed();
    Ok(())
}
