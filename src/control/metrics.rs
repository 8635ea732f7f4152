//! Metrics as Prometheus text: read from the rooms when they are asked for, so that nothing on the
//! data path knows of them.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::group::{DataState, Role};
use crate::replication::ScrubState;

use super::context::Context;

/// The text of all metrics.
///
/// # Errors
///
/// Where it cannot be formatted.
pub fn metrics_text(context: &Arc<Context>) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Rooms(context.clone())));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

struct Rooms(Arc<Context>);

impl fmt::Debug for Rooms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rooms")
    }
}

/// The labels of one sample.
type Labels = Vec<(&'static str, String)>;

/// One metric with its samples.
struct Family {
    name: &'static str,
    help: &'static str,
    counts_up: bool,
    samples: Vec<(Labels, f64)>,
}

impl Collector for Rooms {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for family in families(&self.0) {
            let kind = if family.counts_up { MetricType::Counter } else { MetricType::Gauge };
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, kind)?;
            for (labels, value) in &family.samples {
                let mut sample = metric.encode_family(labels)?;
                if family.counts_up {
                    sample.encode_counter::<Labels, f64, f64>(value, None)?;
                } else {
                    sample.encode_gauge(value)?;
                }
            }
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "a metric is a float; 2^53 bytes is 8 PiB")]
fn families(context: &Context) -> Vec<Family> {
    let gauge = |name, help| Family { name, help, counts_up: false, samples: Vec::new() };
    let counter = |name, help| Family { name, help, counts_up: true, samples: Vec::new() };
    let mut info = gauge("tidelog_build_info", "The program of this node");
    let labels = vec![
        ("node", context.node.name.to_string()),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
    ];
    info.samples.push((labels, 1.0));
    let mut primary = gauge("tidelog_group_primary", "1 where this node is the group's primary");
    let mut consistent = gauge("tidelog_group_consistent", "1 where the data here is consistent");
    let mut head = gauge("tidelog_log_head_bytes", "Position after the last record appended");
    let mut durable = gauge("tidelog_log_durable_bytes", "Position up to which the log is durable");
    let mut committed =
        gauge("tidelog_log_committed_bytes", "Position up to which the primary is durable");
    let mut horizon = gauge("tidelog_log_horizon_bytes", "Position folded into the base");
    let mut used = gauge("tidelog_log_used_bytes", "Bytes of the log from horizon to head");
    let mut allocated =
        gauge("tidelog_log_allocated_bytes", "Bytes that the files of the log take on disk");
    let mut limit = gauge("tidelog_log_limit_bytes", "Bytes that the log may take");
    let mut window =
        gauge("tidelog_protection_window_seconds", "How far back one can go, in log time");
    let mut requests = counter("tidelog_requests", "Requests in the log");
    let mut size = gauge("tidelog_volume_size_bytes", "Bytes of a volume");
    let mut clients = gauge("tidelog_volume_clients", "Connections that have a volume open");
    let mut capable = gauge("tidelog_backup_capable", "1 where the copy may be backed up now");
    let mut connected_to = gauge("tidelog_peer_connected", "1 where the link to a peer is up");
    let mut lag_bytes = gauge("tidelog_peer_lag_bytes", "Bytes that the copy has not received");
    let mut lag_operations = gauge("tidelog_peer_lag_operations", "Requests that it has not");
    let mut lag_seconds =
        gauge("tidelog_peer_lag_seconds", "Age of the oldest byte that it has not");
    let mut rpo =
        gauge("tidelog_peer_rpo_actual_seconds", "Age of the oldest byte not durable there");
    let mut damaged = gauge("tidelog_damaged_parts", "Parts of a group damaged on this disk");
    let mut scrubbed =
        gauge("tidelog_scrub_read_bytes", "Bytes that the scrub that runs, or the last one, read");
    let mut scrub_found = gauge("tidelog_scrub_damaged_parts", "Parts that it found damaged");
    let mut scrub_repaired = gauge("tidelog_scrub_repaired_parts", "Those that were repaired");
    let mut scrub_running = gauge("tidelog_scrub_running", "1 while a scrub runs");
    let mut differing = gauge(
        "tidelog_verify_differing_bytes",
        "Bytes that the last comparison with a peer, or one that none has refuted, found to differ",
    );
    let mut alarms = gauge(
        "tidelog_backup_alarms",
        "Slots without a backup, or not known of, and jobs whose last run failed here",
    );
    let raised = [context.scheduler.alarms(), context.scheduler.failures()].concat();
    for state in ["overdue", "unknown", "failed"] {
        let count = raised.iter().filter(|alarm| alarm.state == state).count();
        alarms.samples.push((vec![("state", state.to_owned())], count as f64));
    }
    for group in context.registry.groups() {
        for peer in context.replication.status(&group) {
            let push = |family: &mut Family, value: f64| {
                let labels = vec![("group", group.name().to_string()), ("peer", peer.name.clone())];
                family.samples.push((labels, value));
            };
            push(&mut connected_to, f64::from(u8::from(peer.link_state == "connected")));
            // What is not known has no sample.
            if let Some(bytes) = peer.lag.bytes {
                push(&mut lag_bytes, bytes as f64);
            }
            if let Some(operations) = peer.lag.operations {
                push(&mut lag_operations, operations as f64);
            }
            push(&mut lag_seconds, peer.lag.seconds);
            push(&mut rpo, peer.rpo_actual_seconds);
        }
        let verdict = context.replication.backup_capable(&group, None).is_yes();
        capable
            .samples
            .push((vec![("group", group.name().to_string())], f64::from(u8::from(verdict))));
        let positions = group.positions();
        let push = |family: &mut Family, value: f64| {
            family.samples.push((vec![("group", group.name().to_string())], value));
        };
        push(&mut primary, f64::from(u8::from(group.role() == Role::Primary)));
        let is_consistent = group.data_state().0 == DataState::Consistent;
        push(&mut consistent, f64::from(u8::from(is_consistent)));
        let compared = context.replication.verify_status(&group).into_iter();
        let compared = compared.chain(context.replication.differences(&group));
        if let Some(most) = compared.map(|verify| verify.differing_bytes).max() {
            push(&mut differing, most as f64);
        }
        push(&mut damaged, context.replication.damage(&group).len() as f64);
        if let Some(scrub) = context.replication.scrub_status(&group) {
            push(&mut scrubbed, scrub.read_bytes as f64);
            push(&mut scrub_found, scrub.damaged as f64);
            push(&mut scrub_repaired, scrub.repaired as f64);
            let running = scrub.state == ScrubState::Running;
            push(&mut scrub_running, f64::from(u8::from(running)));
        }
        push(&mut head, positions.head.0 as f64);
        push(&mut durable, positions.durable.0 as f64);
        push(&mut committed, positions.committed.0 as f64);
        push(&mut horizon, positions.horizon.0 as f64);
        push(&mut used, positions.head.bytes_since(positions.horizon) as f64);
        push(&mut allocated, positions.log_used_bytes as f64);
        push(&mut limit, positions.log_limit_bytes as f64);
        push(&mut window, positions.time.since(positions.horizon_time).as_secs_f64());
        push(&mut requests, positions.requests as f64);
        let connected = group.clients();
        for volume in &group.control().volumes {
            let labels =
                vec![("group", group.name().to_string()), ("volume", volume.name.to_string())];
            size.samples.push((labels.clone(), volume.size_bytes as f64));
            let here = connected.iter().filter(|(number, _)| *number == volume.number);
            clients.samples.push((labels, here.map(|(_, count)| *count as f64).sum()));
        }
    }
    let nbd = &context.nbd_counters;
    let total = |name, help, value: u64| Family {
        name,
        help,
        counts_up: true,
        samples: vec![(Vec::new(), value as f64)],
    };
    let connections = Family {
        name: "tidelog_nbd_connections",
        help: "NBD connections now",
        counts_up: false,
        samples: vec![(Vec::new(), nbd.connections.value() as f64)],
    };
    vec![
        connections,
        total("tidelog_nbd_accepted", "NBD connections ever", nbd.connections_total.value()),
        total("tidelog_nbd_refused", "NBD connections closed at once", nbd.refused_total.value()),
        total("tidelog_nbd_requests", "NBD requests", nbd.requests.value()),
        total("tidelog_nbd_errors", "NBD requests answered with an error", nbd.errors.value()),
        total("tidelog_nbd_read_bytes", "Bytes read by NBD clients", nbd.read_bytes.value()),
        total(
            "tidelog_nbd_written_bytes",
            "Bytes written by NBD clients",
            nbd.written_bytes.value(),
        ),
        info,
        primary,
        consistent,
        head,
        durable,
        committed,
        horizon,
        used,
        allocated,
        limit,
        window,
        requests,
        size,
        clients,
        capable,
        connected_to,
        lag_bytes,
        lag_operations,
        lag_seconds,
        rpo,
        damaged,
        scrubbed,
        scrub_found,
        scrub_repaired,
        scrub_running,
        differing,
        alarms,
    ]
}
