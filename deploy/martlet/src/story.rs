//! The stories that `martlet admin` prints: of a message, a token, a topic, a project's messages.
//!
//! Owns their words. Shard times are printed as they are told, in UTC; what came from clients is escaped, for a terminal must not obey it.

use std::time::{Duration, UNIX_EPOCH};

use martlet_proto::cluster::admin::{CountsReply, Fate, RecallReply, ShardCounts, Story, TokenReply, TopicReply};

use crate::admin::table;

const DAY_MS: u64 = 86_400_000;

/// The last millisecond of the year 9999, beyond which a date has another form.
const LATEST_MS: u64 = 253_402_300_799_999;

/// What became of a message, line by line.
pub(crate) fn message(story: &Story) -> String {
    let Story { message_id, shard, term, index, .. } = story;
    let token = match &*story.token {
        "" => "of a registration that is gone".to_owned(),
        token => format!("token {token}"),
    };
    let mut lines = vec![
        format!("message   {message_id}"),
        format!("to        {token}"),
        format!("accepted  {}, shard {shard}, term {term}, index {index}", time(story.accepted_ms)),
    ];
    lines.push(format!("{:<9} {}", word(story.fate()), became(story)));
    lines.join("\n")
}

/// What became of it, in a sentence.
fn became(story: &Story) -> String {
    let ended = || time(story.ended_ms);
    match story.fate() {
        Fate::Waiting => {
            let until = time(story.expires_ms);
            match (story.gateway, story.written) {
                (0, _) => format!("for its device, which is not connected; until {until}"),
                (_, true) => format!("for its ack: written to the device through {}; until {until}", gateway(story)),
                (_, false) => format!("to be written to the device through {}; until {until}", gateway(story)),
            }
        }
        Fate::Delivered if story.gateway == 0 => format!("{}: the device acked it", ended()),
        Fate::Delivered => format!("{}: the device acked it through {}", ended(), gateway(story)),
        Fate::Expired => format!("{}: its time to live ended before the device came for it", ended()),
        Fate::Collapsed => {
            format!("{}: message {} took its place, of its collapse key or of one key too many", ended(), story.by)
        }
        Fate::Overflow => {
            format!("{}: too many messages waited for the device, or were written and not acked", ended())
        }
        Fate::Unregistered => format!("{}: its registration went", ended()),
        Fate::Recalled => format!("{}: an operator took it back", ended()),
        Fate::Unspecified => "in a way that this version does not know".to_owned(),
    }
}

/// The word of a fate.
fn word(fate: Fate) -> &'static str {
    match fate {
        Fate::Waiting => "waits",
        Fate::Delivered => "delivered",
        Fate::Expired => "expired",
        Fate::Collapsed => "collapsed",
        Fate::Overflow => "overflow",
        Fate::Unregistered => "unregistered",
        Fate::Recalled => "recalled",
        Fate::Unspecified => "ended",
    }
}

/// That a message is not known, and what that can mean.
pub(crate) fn nobody_knows(message_id: &str, silent: &[u64]) -> String {
    let nodes = match silent {
        [] => String::new(),
        silent => format!(" Nodes {silent:?} did not answer: it may wait there."),
    };
    format!(
        "no node knows message {}: it was never accepted, was sent with time to live 0, or ended longer ago than stories are kept \
         (shard.stories_for, shard.stories_max).{nodes}",
        message_id.escape_debug()
    )
}

/// What a token is and what became of its messages.
pub(crate) fn token(reply: &TokenReply) -> String {
    let state = if !reply.registered {
        "not registered: never was, or is gone".to_owned()
    } else if reply.superseded_ms > 0 {
        format!("superseded {} by token {}: messages go there", time(reply.superseded_ms), reply.successor)
    } else {
        "registered".to_owned()
    };
    let device = match (reply.connected, reply.last_seen_day) {
        (true, _) => format!("connected through {}", named(reply.gateway, &reply.gateway_name)),
        (false, 0) => "not connected".to_owned(),
        (false, day) => format!("not connected; last here on {}", date(u64::from(day))),
    };
    let mut lines = vec![
        format!("token        {}", reply.token),
        format!("state        {state}"),
        format!("shard        {}, led by node {}", reply.shard, reply.node_id),
    ];
    if !reply.leads {
        lines[2] = format!(
            "shard        {}, which nobody leads at this moment: what follows is what node {} has",
            reply.shard, reply.node_id
        );
    }
    if reply.registered {
        let expires = match reply.expires_ms {
            0 => "never".to_owned(),
            at => time(at),
        };
        lines.extend([
            format!("application  {}", reply.application.escape_debug()),
            format!("senders      {}", reply.senders.join(", ")),
            format!("registered   {}; expires {expires}", time(reply.created_ms)),
        ]);
        if !reply.subtype.is_empty() {
            lines.push(format!("subtype      {}", reply.subtype.escape_debug()));
        }
    }
    lines.push(format!("device       {device}"));
    lines.push(match reply.waiting {
        0 => "waiting      nothing".to_owned(),
        count => format!(
            "waiting      {} of {} bytes, the oldest since {}",
            messages(count),
            reply.waiting_bytes,
            time(reply.oldest_ms)
        ),
    });
    if !reply.silent_nodes.is_empty() {
        lines.push(format!("nodes {:?} did not answer: they may know more of its messages", reply.silent_nodes));
    }
    let mut rows = table(&["message", "accepted", "became", "since"]);
    for story in &reply.stories {
        let since = match story.ended_ms {
            0 => String::new(),
            at => time(at),
        };
        rows.add_row([story.message_id.clone(), time(story.accepted_ms), word(story.fate()).to_owned(), since]);
    }
    lines.push(rows.to_string());
    lines.join("\n")
}

/// What came of a recall.
pub(crate) fn recalled(reply: &RecallReply) -> String {
    match (&reply.story, reply.count) {
        (Some(story), 0) => format!("nothing to take back:\n{}", message(story)),
        (None, 0) => "nothing waits under that key".to_owned(),
        (Some(story), _) if story.written => {
            format!("recalled {}; it was written to the device already, which may have shown it", story.message_id)
        }
        (Some(story), _) => format!("recalled {}", story.message_id),
        (None, count) => format!("recalled {}", messages(u64::from(count))),
    }
}

/// Who subscribes to a topic.
pub(crate) fn topic(name: &str, reply: &TopicReply) -> String {
    let subscribers: u64 = reply.shards.iter().map(|of| of.subscribers).sum();
    let open: u64 = reply.shards.iter().map(|of| of.open).sum();
    let mut rows = table(&["shard", "subscribers"]);
    for of in reply.shards.iter().filter(|of| of.subscribers > 0) {
        rows.add_row([of.shard.to_string(), of.subscribers.to_string()]);
    }
    format!(
        "topic             {}\nhome              shard {}\nsubscribers       {subscribers}\non their way      {}\n{rows}{}",
        name.escape_debug(),
        reply.home,
        messages(open),
        missing(reply.shards.len(), reply.shard_count)
    )
}

/// What became of a project's messages.
pub(crate) fn counts(sender_id: &str, reply: &CountsReply, each: bool) -> String {
    let row = |name: String, of: &ShardCounts| {
        [
            name,
            of.accepted.to_string(),
            of.delivered.to_string(),
            of.waiting.to_string(),
            of.expired.to_string(),
            of.collapsed.to_string(),
            of.overflow.to_string(),
            of.unregistered.to_string(),
            of.recalled.to_string(),
            of.stored_bytes.to_string(),
        ]
    };
    let mut all = ShardCounts::default();
    for of in &reply.shards {
        all.accepted += of.accepted;
        all.delivered += of.delivered;
        all.waiting += of.waiting;
        all.expired += of.expired;
        all.collapsed += of.collapsed;
        all.overflow += of.overflow;
        all.unregistered += of.unregistered;
        all.recalled += of.recalled;
        all.stored_bytes += of.stored_bytes;
    }
    let mut rows = table(&[
        "shard",
        "accepted",
        "delivered",
        "waiting",
        "expired",
        "collapsed",
        "overflow",
        "unregistered",
        "recalled",
        "stored bytes",
    ]);
    for of in reply.shards.iter().filter(|of| each && of.accepted > 0) {
        rows.add_row(row(of.shard.to_string(), of));
    }
    rows.add_row(row("all".to_owned(), &all));
    format!("sender id  {sender_id}\n{rows}{}", missing(reply.shards.len(), reply.shard_count))
}

/// A line about shards that did not answer; empty when all did.
fn missing(answered: usize, count: u32) -> String {
    match count as usize - answered.min(count as usize) {
        0 => String::new(),
        silent => format!("\n{silent} of {count} shards did not answer: `cluster status` tells why"),
    }
}

fn messages(count: u64) -> String {
    if count == 1 { "1 message".to_owned() } else { format!("{count} messages") }
}

fn gateway(story: &Story) -> String {
    named(story.gateway, &story.gateway_name)
}

fn named(gateway: u32, name: &str) -> String {
    match name {
        "" => format!("gateway {gateway:08x}, which is gone"),
        name => format!("gateway {name} ({gateway:08x})"),
    }
}

/// Milliseconds since 1970 as RFC 3339 spells them.
fn time(ms: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms.min(LATEST_MS))).to_string()
}

/// Days since 1970 as `YYYY-MM-DD`.
fn date(day: u64) -> String {
    time(day.saturating_mul(DAY_MS)).chars().take(10).collect()
}

#[cfg(test)]
mod tests {
    use martlet_proto::cluster::admin::TopicShard;

    use super::*;

    fn story(fate: Fate) -> Story {
        Story {
            message_id: "0:1%00000000000000aa".into(),
            fate: fate as i32,
            shard: 3,
            term: 2,
            index: 41,
            accepted_ms: 1_700_000_000_123,
            ended_ms: 1_700_000_001_000,
            expires_ms: 1_702_419_200_123,
            token: "t#1".into(),
            ..Story::default()
        }
    }

    #[test]
    fn the_story_of_a_delivered_message_says_where_it_is_in_the_log_and_which_gateway_brought_the_ack() {
        let told = Story { gateway: 0xab, gateway_name: "gw-1".into(), ..story(Fate::Delivered) };
        assert_eq!(
            message(&told),
            "message   0:1%00000000000000aa\nto        token t#1\naccepted  2023-11-14T22:13:20.123Z, shard 3, term 2, index 41\n\
             delivered 2023-11-14T22:13:21.000Z: the device acked it through gateway gw-1 (000000ab)"
        );
        let gone = Story { gateway: 0xab, ..story(Fate::Delivered) };
        assert!(message(&gone).ends_with("through gateway 000000ab, which is gone"), "a gateway that was restarted");
    }

    #[test]
    fn a_waiting_message_says_for_what() {
        assert!(message(&story(Fate::Waiting)).contains("not connected; until 2023-12-12"));
        let connected = Story { gateway: 7, gateway_name: "gw".into(), ..story(Fate::Waiting) };
        assert!(message(&connected).contains("to be written to the device through gateway gw"));
        assert!(message(&Story { written: true, ..connected }).contains("for its ack: written"));
    }

    #[test]
    fn every_fate_has_a_word_and_a_sentence() {
        for fate in (0..20).filter_map(|number| Fate::try_from(number).ok()) {
            let text = message(&story(fate));
            assert!(text.contains(word(fate)) && text.lines().count() == 4, "{text}");
        }
    }

    #[test]
    fn what_clients_wrote_cannot_move_a_terminal() {
        let reply = TokenReply { registered: true, application: "a\u{1b}[2J".into(), ..TokenReply::default() };
        assert!(!token(&reply).contains('\u{1b}'));
        assert!(!nobody_knows("\u{1b}", &[]).contains('\u{1b}'));
        assert!(!topic("\u{1b}", &TopicReply::default()).contains('\u{1b}'));
    }

    #[test]
    fn a_time_that_cannot_be_is_told_all_the_same() {
        assert_eq!(time(u64::MAX), "9999-12-31T23:59:59.999Z");
        assert_eq!((date(0), date(u64::MAX)), ("1970-01-01".to_owned(), "9999-12-31".to_owned()));
    }

    #[test]
    fn shards_that_did_not_answer_are_told() {
        let shards = vec![TopicShard { shard: 1, subscribers: 5, open: 0 }];
        let reply = TopicReply { shards, home: 1, shard_count: 4 };
        assert!(topic("x", &reply).ends_with("3 of 4 shards did not answer: `cluster status` tells why"));
        assert!(!topic("x", &TopicReply { shard_count: 1, ..reply }).contains("did not answer"));
    }

    #[test]
    fn the_counters_of_all_shards_are_summed() {
        let of = |shard| ShardCounts { shard, accepted: 5, delivered: 2, waiting: 3, ..ShardCounts::default() };
        let reply = CountsReply { shards: vec![of(0), of(1)], shard_count: 2 };
        let all = |text: &str| text.lines().find(|line| line.contains(" all ")).unwrap().to_owned();
        assert!(all(&counts("42", &reply, false)).contains("10"));
        assert_eq!(counts("42", &reply, true).lines().count(), counts("42", &reply, false).lines().count() + 2);
    }
}
