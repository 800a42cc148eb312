//! `topic`: what one message to a topic costs whose subscribers are many, and what others notice of it.
//!
//! Of the devices on line half subscribe; so does every registered device that is away. The other half on line are bystanders: they
//! get messages of their own at a rate, in windows without and windows with a message to the topic, in turn. Log entries are counted
//! before anybody is on line, of one message in a cluster that does nothing else, per shard, against one for a thousand subscribers.
//! Every subscriber on line, and a sample of those away, which comes on line at the end, must have each message exactly once: the
//! ledger judges that no message is lost or changed, and here is counted whether any was stored twice, under two ids.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use martlet_proto::cluster::admin::{StatusReply, StatusRequest, TopicReply, TopicRequest, admin_client::AdminClient};
use serde::Serialize;
use tokio::{sync::Semaphore, task::JoinSet};

use super::{Run, SENDERS_DEFAULT, STORE_PATIENCE, Sending, progress};
use crate::{
    app_server::{Sent, Target},
    cluster::{Cluster, Member},
    fleet::Device,
    history::{Event, Phase, What},
    pace::Pace,
    patience::Patience,
    report::{Report, to_f64},
};

/// Name of the topic.
const TOPIC: &str = "loadtest";

/// Tokens of one subscribing call. Source: gcm-http.md section 8.2.
const BATCH_MAX: usize = 1_000;

/// Subscribers that one log entry of a fan-out serves. Source: design.md section 4, "Topics".
const OF_ONE_ENTRY: u64 = 1_000;

/// A message is handed over everywhere, and its home has said so in its log, this long after the last entry at the latest.
const SETTLE: Duration = Duration::from_secs(15);

/// Pause behind a window, so that what it began is over.
const PAUSE: Duration = Duration::from_millis(500);

/// A killed leader stays away this long.
const AWAY: Duration = Duration::from_secs(2);

/// Figures of `topic`. Field names are keys of the JSON line: they stay.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TopicFigures {
    /// Registrations that subscribe.
    pub subscribers: u64,
    /// Those of the shard that has most.
    pub subscribers_of_a_shard_max: u64,
    /// Messages to the topic.
    pub publishes: usize,
    /// Median of the milliseconds until one is answered, while others send.
    pub publish_ms: f64,
    /// Log entries of one message in the shard that needed most, its home apart.
    pub entries_of_a_shard_max: u64,
    /// Log entries of one message beyond one and one for each thousand subscribers, in the shard that is furthest beyond; its home,
    /// which also keeps it and says when it is over, apart. 0 or less is what is promised.
    pub entries_beyond_max: i64,
    /// Log entries of one message at its home.
    pub entries_of_home: u64,
    /// Medians over the rounds of what bystanders see, milliseconds: p50 and p99 without and with a message to the topic.
    pub quiet_p50_ms: f64,
    /// As above.
    pub quiet_p99_ms: f64,
    /// As above.
    pub busy_p50_ms: f64,
    /// As above.
    pub busy_p99_ms: f64,
    /// The median of the rounds' ratios, p99 with over p99 without.
    pub p99_ratio: f64,
    /// Resident memory of each node before the first message to the topic and after the last, bytes.
    pub node_rss_before_bytes: Vec<u64>,
    /// As above.
    pub node_rss_after_bytes: Vec<u64>,
    /// Devices that were judged: those on line, and the sample of those away.
    pub judged: usize,
    /// Messages that a device got under more than one id: stored twice.
    pub stored_twice: usize,
    /// Whether the leader of the topic's home was killed in the middle of a fan-out.
    pub leader_killed: bool,
}

impl TopicFigures {
    /// For the table.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let memory = |bytes: &[u64]| {
            let each: Vec<String> = bytes.iter().map(|bytes| format!("{:.0}", to_f64(*bytes) / 1e6)).collect();
            each.join("/")
        };
        vec![
            (
                "topic",
                format!(
                    "{} subscribers, {} in a shard at most; {} messages, answered in {:.1} ms",
                    self.subscribers, self.subscribers_of_a_shard_max, self.publishes, self.publish_ms
                ),
            ),
            (
                "log entries a message",
                format!(
                    "{} in a shard at most ({} beyond the bound), {} at its home",
                    self.entries_of_a_shard_max, self.entries_beyond_max, self.entries_of_home
                ),
            ),
            (
                "bystanders",
                format!(
                    "p50 {:.1} ms, p99 {:.1} ms; with a message to the topic {:.1} ms, {:.1} ms: {:.2}",
                    self.quiet_p50_ms, self.quiet_p99_ms, self.busy_p50_ms, self.busy_p99_ms, self.p99_ratio
                ),
            ),
            (
                "nodes' memory",
                format!(
                    "{} MB before, {} after",
                    memory(&self.node_rss_before_bytes),
                    memory(&self.node_rss_after_bytes)
                ),
            ),
            (
                "subscribers judged",
                format!(
                    "{}; stored twice: {}{}",
                    self.judged,
                    self.stored_twice,
                    if self.leader_killed { "; with a leader killed in the middle" } else { "" }
                ),
            ),
        ]
    }

    /// What of it breaks a promise, in words for the report.
    pub fn violations(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.stored_twice > 0 {
            found.push(format!("{} messages were stored twice for a device", self.stored_twice));
        }
        if self.entries_beyond_max > 0 {
            found.push(format!("a shard needed {} log entries more than promised", self.entries_beyond_max));
        }
        found
    }
}

/// What bystanders saw in one window, milliseconds.
#[derive(Debug, Clone, Copy)]
struct Seen {
    p50: f64,
    p99: f64,
}

/// Who is who, by place in the fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Roles {
    bystanders: usize,
    on_line: usize,
    registered: usize,
    sample: usize,
}

impl Roles {
    /// Of so many on line half are bystanders.
    fn new(on_line: usize, registered: usize, sample: usize) -> Self {
        Self { bystanders: on_line / 2, on_line, registered, sample }
    }

    fn is_subscriber(&self, at: usize) -> bool {
        at >= self.bystanders
    }

    /// Those away who come on line at the end, spread over all.
    fn sampled(&self) -> BTreeSet<usize> {
        let away = self.registered - self.on_line;
        let every = away.div_ceil(self.sample.max(1)).max(1);
        (self.on_line..self.registered).step_by(every).collect()
    }
}

impl Run<'_> {
    pub(super) async fn topic(&mut self) -> Result<Report> {
        if self.broker.cluster.is_none() {
            bail!("topic looks at processes: use --local-cluster");
        }
        let roles = Roles::new(self.plan.devices, self.plan.registered, self.plan.sample);
        if roles.bystanders == 0 {
            bail!("--devices {}: at least 2, half of them are bystanders", self.plan.devices);
        }
        let sending = Arc::new(Sending::default());
        self.subscribe(&roles).await?;
        tokio::time::sleep(SETTLE).await;
        let told = self.told().await?;
        let subscribers: u64 = told.shards.iter().map(|shard| shard.subscribers).sum();
        if subscribers != (roles.registered - roles.bystanders) as u64 {
            bail!("the broker tells of {subscribers} subscribers, not {}", roles.registered - roles.bystanders);
        }
        let node_rss_before_bytes = self.node_rss();
        let judged: Vec<Arc<Device>> = (roles.bystanders..roles.on_line)
            .chain(roles.sampled())
            .map(|at| Arc::clone(&self.fleet.devices[at]))
            .collect();

        // One message in a cluster that does nothing else.
        let before = self.applied().await?;
        let mut answered = vec![self.publish(&sending, &judged, "first").await?];
        tokio::time::sleep(SETTLE).await;
        let entries = entries(&before, &self.applied().await?);
        let figures = of_entries(&entries, &told);

        self.bring_on_line().await?;
        let begin = self.edge(&sending);
        let (mut quiet, mut busy) = (Vec::new(), Vec::new());
        let bar = progress(self.quiet, "rounds", 2 * self.plan.rounds);
        for round in 0..self.plan.rounds {
            quiet.push(self.window(&sending, &roles, &judged, None).await?.0);
            bar.inc(1);
            let (seen, took) = self.window(&sending, &roles, &judged, Some(format!("round{round}"))).await?;
            busy.push(seen);
            answered.extend(took);
            bar.inc(1);
        }
        bar.finish_and_clear();
        if self.plan.kill_leader {
            let home = told.home;
            answered.push(self.publish(&sending, &judged, "killed").await?);
            self.kill_leader_of(home).await?;
        }
        let end = self.edge(&sending);
        self.fleet.connect(roles.sampled());
        self.drain(&sending).await;
        let node_rss_after_bytes = self.node_rss();
        let resident = self.broker.cluster.as_ref().map_or(0, Cluster::resident_bytes);
        self.fleet.leave().await;
        let mut report = self.report(&begin, &end, resident);
        report.throughput_per_s = to_f64(end.acked - begin.acked) / report.seconds;
        let ratios = quiet.iter().zip(&busy).map(|(quiet, busy)| busy.p99 / quiet.p99.max(f64::MIN_POSITIVE));
        report.topic = Some(TopicFigures {
            subscribers,
            subscribers_of_a_shard_max: told.shards.iter().map(|shard| shard.subscribers).max().unwrap_or(0),
            publishes: answered.len(),
            publish_ms: median(answered.into_iter()),
            quiet_p50_ms: median(quiet.iter().map(|seen| seen.p50)),
            quiet_p99_ms: median(quiet.iter().map(|seen| seen.p99)),
            busy_p50_ms: median(busy.iter().map(|seen| seen.p50)),
            busy_p99_ms: median(busy.iter().map(|seen| seen.p99)),
            p99_ratio: median(ratios),
            node_rss_before_bytes,
            node_rss_after_bytes,
            judged: judged.len(),
            leader_killed: self.plan.kill_leader,
            ..figures
        });
        Ok(report)
    }

    /// Has everybody but the bystanders subscribe, a thousand to a call.
    async fn subscribe(&self, roles: &Roles) -> Result<()> {
        let subscribers: Vec<String> = (0..roles.registered)
            .filter(|at| roles.is_subscriber(*at))
            .map(|at| self.fleet.devices[at].token.clone())
            .collect();
        let bar = progress(self.quiet, "subscribing", subscribers.len());
        let slots = Arc::new(Semaphore::new(4));
        let mut calls = JoinSet::new();
        for batch in subscribers.chunks(BATCH_MAX) {
            let slot = Arc::clone(&slots).acquire_owned().await?;
            let (app_server, batch) = (self.app_server.clone(), batch.to_vec());
            bar.inc(batch.len() as u64);
            calls.spawn(async move {
                let _slot = slot;
                let mut patience = Patience::of(STORE_PATIENCE);
                let mut left = batch;
                while !left.is_empty() {
                    left = app_server.subscribe(TOPIC, left).await?;
                    if !left.is_empty() {
                        let pause = patience.pause(None).context("subscriptions were refused for two minutes")?;
                        tokio::time::sleep(pause).await;
                    }
                }
                Ok::<(), anyhow::Error>(())
            });
        }
        while let Some(done) = calls.join_next().await {
            done.context("a subscribing call panicked")??;
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Sends one message to the topic; how long its answer took, milliseconds. Refused for now, it is sent again.
    async fn publish(&self, sending: &Arc<Sending>, judged: &[Arc<Device>], name: &str) -> Result<f64> {
        let targets: Vec<Target> =
            judged.iter().map(|device| Target { device: device.name.clone(), token: device.token.clone() }).collect();
        let mut patience = Patience::of(STORE_PATIENCE);
        for attempt in 0.. {
            for device in judged {
                device.outstanding.fetch_add(1, Ordering::Relaxed);
            }
            let begun = self.clock.secs();
            let name = format!("topic.{name}.{attempt}");
            let sent = self.app_server.publish(&self.clock, &self.recorder, TOPIC, &name, &targets).await;
            if let Sent::Acked(_) = sent {
                sending.acked.fetch_add(judged.len() as u64, Ordering::Relaxed);
                return Ok((self.clock.secs() - begun) * 1e3);
            }
            for device in judged {
                let _ = device.outstanding.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            }
            let Sent::Busy { retry_after, .. } = &sent else { bail!("a message to the topic was answered {sent:?}") };
            let pause = patience.pause(*retry_after).context("messages to the topic were refused for two minutes")?;
            tokio::time::sleep(pause).await;
        }
        bail!("never sent")
    }

    /// Sends to bystanders for a while, and perhaps a message to the topic in the middle of it.
    async fn window(
        &self,
        sending: &Arc<Sending>,
        roles: &Roles,
        judged: &[Arc<Device>],
        publish: Option<String>,
    ) -> Result<(Seen, Option<f64>)> {
        let bystanders: Arc<[Arc<Device>]> = self.fleet.devices[..roles.bystanders].into();
        let of_window = Arc::new(Sending::default());
        self.latency().reset();
        self.fleet.seen.measuring.store(true, Ordering::Relaxed);
        let pace = Pace::new(self.clock.elapsed(), self.plan.rate.unwrap_or(f64::from(SENDERS_DEFAULT as u32)));
        let mut sender = JoinSet::new();
        sender.spawn(self.sender(&of_window, &bystanders).open_loop(pace));
        tokio::time::sleep(self.plan.window / 4).await;
        let mut answered = None;
        if let Some(name) = publish {
            answered = Some(self.publish(sending, judged, &name).await?);
        }
        tokio::time::sleep(self.plan.window - self.plan.window / 4).await;
        of_window.stop.store(true, Ordering::Relaxed);
        while let Some(done) = sender.join_next().await {
            done.context("a sender panicked")?;
        }
        tokio::time::sleep(PAUSE).await;
        self.fleet.seen.measuring.store(false, Ordering::Relaxed);
        sending.acked.fetch_add(of_window.acked.load(Ordering::Relaxed), Ordering::Relaxed);
        let latency = self.latency();
        let ms = |quantile: f64| to_f64(latency.value_at_quantile(quantile)) / 1e3;
        Ok((Seen { p50: ms(0.5), p99: ms(0.99) }, answered))
    }

    fn latency(&self) -> std::sync::MutexGuard<'_, hdrhistogram::Histogram<u64>> {
        self.fleet.seen.latency_micros.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cluster(&self) -> Result<&Cluster> {
        self.broker.cluster.as_ref().context("it was there")
    }

    fn node_rss(&self) -> Vec<u64> {
        let each = self.broker.cluster.as_ref().map(Cluster::resident_bytes_each).unwrap_or_default();
        let nodes = self.broker.cluster.as_ref().map_or(0, Cluster::nodes);
        each.into_iter().take(nodes).map(|(_, bytes)| bytes).collect()
    }

    /// The status of all nodes, from the first that answers.
    async fn status(&self) -> Result<StatusReply> {
        for address in self.cluster()?.grpc() {
            let Ok(mut client) = AdminClient::connect(format!("http://{address}")).await else { continue };
            if let Ok(reply) = client.status(StatusRequest { cluster_wide: true }).await {
                return Ok(reply.into_inner());
            }
        }
        bail!("no node answers")
    }

    /// What the nodes tell of the topic: of every shard.
    async fn told(&self) -> Result<TopicReply> {
        let sender_id = self.broker.project.sender_id.clone();
        let request = TopicRequest { sender_id, name: TOPIC.to_owned(), here: false };
        let node = self.cluster()?.grpc().into_iter().next().context("a cluster has nodes")?;
        let mut client = AdminClient::connect(format!("http://{node}")).await?;
        let reply = client.topic(request).await?.into_inner();
        if reply.shards.len() != reply.shard_count as usize {
            bail!("{} of {} shards tell of the topic", reply.shards.len(), reply.shard_count);
        }
        Ok(reply)
    }

    /// Highest log index applied of each shard.
    async fn applied(&self) -> Result<BTreeMap<u32, u64>> {
        let status = self.status().await?;
        let mut applied = BTreeMap::new();
        for group in status.nodes.iter().flat_map(|node| &node.groups) {
            if let Some(shard) = group.group.checked_sub(1) {
                let highest: &mut u64 = applied.entry(shard).or_default();
                *highest = group.applied_index.max(*highest);
            }
        }
        Ok(applied)
    }

    /// Kills the node that leads a shard, and starts it again a little later.
    async fn kill_leader_of(&mut self, shard: u32) -> Result<()> {
        let status = self.status().await?;
        let leads = status.nodes.iter().find(|node| {
            node.groups.iter().any(|group| group.group == shard + 1 && group.leader_replica == group.replica_id)
        });
        let node = leads.with_context(|| format!("nobody leads shard {shard}"))?.node_id;
        let at = usize::try_from(node)? - 1;
        let fault = |phase| What::Fault { name: "kill-leader".to_owned(), phase };
        self.recorder.record(self.clock.secs(), fault(Phase::Start));
        let cluster = self.broker.cluster.as_mut().context("it was there")?;
        cluster.kill_node(at)?;
        tokio::time::sleep(AWAY).await;
        cluster.start_member(Member::Node(at))?;
        cluster.wait_ready().await?;
        self.recorder.record(self.clock.secs(), fault(Phase::End));
        Ok(())
    }
}

/// Log entries of each shard between two looks.
fn entries(before: &BTreeMap<u32, u64>, after: &BTreeMap<u32, u64>) -> BTreeMap<u32, u64> {
    let since = |(shard, now): (&u32, &u64)| (*shard, now - before.get(shard).copied().unwrap_or(0).min(*now));
    after.iter().map(since).collect()
}

/// The figures about log entries.
fn of_entries(entries: &BTreeMap<u32, u64>, told: &TopicReply) -> TopicFigures {
    let elsewhere = || told.shards.iter().filter(|shard| shard.shard != told.home);
    let of = |shard: u32| entries.get(&shard).copied().unwrap_or(0);
    let beyond = elsewhere().map(|shard| {
        let bound = 1 + shard.subscribers.div_ceil(OF_ONE_ENTRY);
        of(shard.shard).cast_signed() - bound.cast_signed()
    });
    TopicFigures {
        entries_of_a_shard_max: elsewhere().map(|shard| of(shard.shard)).max().unwrap_or(0),
        entries_beyond_max: beyond.max().unwrap_or(0),
        entries_of_home: of(told.home),
        ..TopicFigures::default()
    }
}

/// Messages to a topic that one device got under several ids.
pub(super) fn stored_twice(events: &[Event]) -> usize {
    let mut ids: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for event in events {
        if let What::Delivered { op: Some(op), message_id: Some(id), .. } = &event.what
            && op.starts_with("topic.")
        {
            ids.entry(op).or_default().insert(id);
        }
    }
    ids.values().filter(|ids| ids.len() > 1).count()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = values.len() / 2;
    match values.len() {
        0 => 0.0,
        len if len % 2 == 1 => values[at],
        _ => f64::midpoint(values[at - 1], values[at]),
    }
}

#[cfg(test)]
mod tests {
    use martlet_proto::cluster::admin::TopicShard;

    use super::*;

    #[test]
    fn half_of_those_on_line_are_bystanders_and_the_sample_is_spread_over_those_away() {
        let roles = Roles::new(4, 104, 10);
        let subscribers: Vec<usize> = (0..6).filter(|at| roles.is_subscriber(*at)).collect();
        assert_eq!(subscribers, [2, 3, 4, 5]);
        let sampled = roles.sampled();
        assert_eq!((sampled.len(), sampled.first(), sampled.last()), (10, Some(&4), Some(&94)));
        assert_eq!(Roles::new(4, 4, 10).sampled().len(), 0);
        assert_eq!(Roles::new(4, 7, 10).sampled().len(), 3, "all, where they are few");
    }

    #[test]
    fn a_shard_may_need_an_entry_and_one_for_each_thousand_subscribers() {
        let shard = |shard, subscribers| TopicShard { shard, subscribers, open: 0 };
        let told = TopicReply { shards: vec![shard(0, 1_001), shard(1, 0), shard(2, 5_000)], home: 2, shard_count: 3 };
        let counted = entries(&BTreeMap::from([(0, 5), (1, 5), (2, 5)]), &BTreeMap::from([(0, 8), (1, 5), (2, 15)]));
        let figures = of_entries(&counted, &told);
        assert_eq!((figures.entries_of_a_shard_max, figures.entries_beyond_max, figures.entries_of_home), (3, 0, 10));
        let one_more = entries(&BTreeMap::from([(0, 5)]), &BTreeMap::from([(0, 9)]));
        let figures = of_entries(&one_more, &told);
        assert_eq!(figures.entries_beyond_max, 1);
        assert_eq!(figures.violations().len(), 1);
    }

    #[test]
    fn one_message_under_two_ids_was_stored_twice_and_one_that_came_twice_was_not() {
        let delivered = |op: &str, id: &str| {
            let what = What::Delivered {
                device: "d".into(),
                op: Some(op.into()),
                message_id: Some(id.into()),
                tenant: None,
                app: None,
                token: None,
                session: None,
                sha: None,
            };
            Event { t: 0.0, what }
        };
        let events = [delivered("topic.a@d", "1"), delivered("topic.a@d", "1"), delivered("topic.a@e", "2")];
        assert_eq!(stored_twice(&events), 0);
        assert_eq!(stored_twice(&[&events[..], &[delivered("topic.a@d", "3")]].concat()), 1);
    }

    #[test]
    fn a_median_is_the_middle_or_between_the_two() {
        assert!((median([3.0, 1.0, 2.0].into_iter()) - 2.0).abs() < f64::EPSILON);
        assert!((median([4.0, 1.0, 2.0, 3.0].into_iter()) - 2.5).abs() < f64::EPSILON);
        assert!(median(std::iter::empty()).abs() < f64::EPSILON);
    }
}
