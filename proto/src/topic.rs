//! Topics: their names, conditions on them, and which shard a publish to them is at home in.
//!
//! Owns the grammar of conditions and its form in the log, postfix, so that shards evaluate and never parse. Knows nothing of
//! subscribers. The invariant: [`Condition`] holds one to five names without repeats and a program over just these.
//!
//! Sources: gcm-http.md section 8; decisions.md.

use sha2::{Digest as _, Sha256};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    limits::{CONDITION_MAX_BYTES, CONDITION_TOPICS_MAX, TOPIC_NAME_MAX_BYTES},
    shard::{Shard, ShardCount},
};

/// What a topic's address begins with.
pub const PREFIX: &str = "/topics/";

/// Parentheses inside parentheses. Ours: five topics need no more than four.
const DEPTH_MAX: usize = 32;

const AND: u8 = 0xfe;
const OR: u8 = 0xff;

/// Whether `name` (without the prefix) names a topic.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~%".contains(byte);
    (1..=TOPIC_NAME_MAX_BYTES).contains(&name.len()) && name.as_bytes().iter().all(allowed)
}

/// Names a topic of a project in keys of rows: 16 bytes, SHA-256 cut, so that nobody can make two topics one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicId(pub [u8; 16]);

impl TopicId {
    /// Of topic `name` of the project with this sender id.
    #[must_use]
    pub fn of(sender: &str, name: &str) -> Self {
        let digest = Sha256::new().chain_update((sender.len() as u64).to_be_bytes()).chain_update(sender);
        let digest: [u8; 32] = digest.chain_update(name).finalize().into();
        Self(std::array::from_fn(|at| digest[at]))
    }
}

/// A text is no condition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"condition\" {0}")]
pub struct BadCondition(String);

/// Which subscribers a message is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    topics: Vec<String>,
    program: Vec<u8>,
}

impl Condition {
    /// Everybody who subscribes to `name`, which [`is_name`].
    #[must_use]
    pub fn topic(name: &str) -> Self {
        Self { topics: vec![name.to_owned()], program: vec![0] }
    }

    /// Reads `'a' in topics && ('b' in topics || 'c' in topics)`: `&&` and `||` have one rank and go from left to right.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn parse(text: &str) -> Result<Self, BadCondition> {
        if text.len() > CONDITION_MAX_BYTES {
            return Err(BadCondition(format!("is longer than {CONDITION_MAX_BYTES} bytes")));
        }
        Parser { text, at: 0, condition: Self { topics: Vec::new(), program: Vec::new() }, named: 0 }.parse()
    }

    /// The topics, in the order in which they were first named.
    #[must_use]
    pub fn topics(&self) -> &[String] {
        &self.topics
    }

    /// The condition in postfix.
    #[must_use]
    pub fn program(&self) -> &[u8] {
        &self.program
    }

    /// The shard that keeps a publish until every other has it.
    #[must_use]
    pub fn home(&self, sender: &str, count: ShardCount) -> Shard {
        let ids = self.topics.iter().flat_map(|name| TopicId::of(sender, name).0);
        let seed: Vec<u8> = ids.chain(self.program.iter().copied()).collect();
        let shard = xxh3_64(&seed) % u64::from(count.get());
        Shard(u16::try_from(shard).expect("below the count, which is at most 256"))
    }
}

/// Whether a program is one over `topics` topics.
#[must_use]
pub fn is_program(program: &[u8], topics: usize) -> bool {
    let mut depth = 0usize;
    let all_known = program.iter().all(|step| match *step {
        AND | OR => {
            depth = depth.wrapping_sub(1);
            (1..=program.len()).contains(&depth)
        }
        topic => {
            depth += 1;
            usize::from(topic) < topics
        }
    });
    all_known && depth == 1
}

/// Whether a program holds for one who subscribes to the topics for which `subscribes` says so. False if it is none.
#[must_use]
pub fn holds(program: &[u8], subscribes: impl Fn(usize) -> bool) -> bool {
    let mut stack: Vec<bool> = Vec::with_capacity(CONDITION_TOPICS_MAX);
    for step in program {
        let value = match *step {
            AND | OR => {
                let (Some(b), Some(a)) = (stack.pop(), stack.pop()) else { return false };
                if *step == AND { a && b } else { a || b }
            }
            topic => subscribes(usize::from(topic)),
        };
        stack.push(value);
    }
    stack == [true]
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    condition: Condition,
    named: usize,
}

impl Parser<'_> {
    fn parse(mut self) -> Result<Condition, BadCondition> {
        // For each open parenthesis the operator that waits for its second side.
        let mut open: Vec<Option<u8>> = vec![None];
        loop {
            while self.takes("(") {
                open.push(None);
                if open.len() > DEPTH_MAX {
                    return Err(self.wrong("has too many parentheses inside each other"));
                }
            }
            self.membership()?;
            loop {
                // One side is complete.
                if let Some(operator) = open.last_mut().and_then(Option::take) {
                    self.condition.program.push(operator);
                }
                if !self.takes(")") {
                    break;
                }
                if open.len() == 1 {
                    return Err(self.wrong("closes a parenthesis that is not open"));
                }
                open.pop();
            }
            let operator = match () {
                () if self.takes("&&") => AND,
                () if self.takes("||") => OR,
                () if self.rest().is_empty() && open.len() == 1 => return Ok(self.condition),
                () => return Err(self.wrong("must go on with && or || or end")),
            };
            *open.last_mut().expect("the whole is never closed") = Some(operator);
        }
    }

    /// `'NAME' in topics`.
    fn membership(&mut self) -> Result<(), BadCondition> {
        if !self.takes("'") {
            return Err(self.wrong("must name a topic between single quotes"));
        }
        let Some(len) = self.text[self.at..].find('\'') else {
            return Err(self.wrong("has a quote that is not closed"));
        };
        let name = self.text[self.at..self.at + len].to_owned();
        if !is_name(&name) {
            return Err(self.wrong("names no topic: characters are [a-zA-Z0-9-_.~%]"));
        }
        self.at += len + 1;
        if !self.takes("in") || !self.takes("topics") {
            return Err(self.wrong("must say \"in topics\" after a name"));
        }
        self.named += 1;
        if self.named > CONDITION_TOPICS_MAX {
            return Err(self.wrong(&format!("names more than {CONDITION_TOPICS_MAX} topics")));
        }
        let topics = &mut self.condition.topics;
        let place = topics.iter().position(|topic| *topic == name).unwrap_or_else(|| {
            topics.push(name);
            topics.len() - 1
        });
        self.condition.program.push(u8::try_from(place).expect("at most five"));
        Ok(())
    }

    fn rest(&mut self) -> &str {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        &self.text[self.at..]
    }

    /// Takes a sign or a keyword, in any case.
    fn takes(&mut self, word: &str) -> bool {
        let is_next = self.rest().get(..word.len()).is_some_and(|next| next.eq_ignore_ascii_case(word));
        if is_next {
            self.at += word.len();
        }
        is_next
    }

    fn wrong(&self, what: &str) -> BadCondition {
        BadCondition(format!("{what} (at byte {})", self.at))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Condition {
        Condition::parse(text).unwrap()
    }

    fn holds_for(text: &str, of: &[&str]) -> bool {
        let condition = parsed(text);
        assert!(is_program(condition.program(), condition.topics().len()));
        holds(condition.program(), |at| of.contains(&condition.topics()[at].as_str()))
    }

    #[test]
    fn h124_core_conditions_hold_from_left_to_right_and_parentheses_first() {
        assert!(holds_for("'a' in topics", &["a"]));
        assert!(!holds_for("'a' in topics", &["b"]));
        let text = "'a' in topics && ('b' in topics || 'c' in topics)";
        assert!(holds_for(text, &["a", "c"]) && holds_for(text, &["a", "b"]));
        assert!(!holds_for(text, &["a"]) && !holds_for(text, &["b", "c"]));
        let equal_rank = "'a' in topics || 'b' in topics && 'c' in topics";
        assert!(!holds_for(equal_rank, &["a"]) && holds_for(equal_rank, &["a", "c"]));
        assert!(holds_for("(('A.~-_%'IN Topics))", &["A.~-_%"]));
        assert_eq!(parsed("'a' in topics || 'a' in topics").topics(), ["a"]);
    }

    #[test]
    fn h125_core_six_topics_and_bad_syntax_are_refused_with_the_place() {
        let many = |count| vec!["'t' in topics"; count].join(" || ");
        assert!(Condition::parse(&many(5)).is_ok());
        let bad = [
            many(6),
            String::new(),
            "a in topics".to_owned(),
            "'a'".to_owned(),
            "'a' in topics &&".to_owned(),
            "'a' in topics & 'b' in topics".to_owned(),
            "'a' in topics)".to_owned(),
            "('a' in topics".to_owned(),
            "'a in topics".to_owned(),
            "'ä' in topics".to_owned(),
            "!('a' in topics)".to_owned(),
            "'a' in topics 'b' in topics".to_owned(),
            "() && 'a' in topics".to_owned(),
            "(".repeat(100_000),
            format!("{}'a' in topics{}", "(".repeat(40), ")".repeat(40)),
        ];
        for text in bad {
            assert!(Condition::parse(&text).unwrap_err().to_string().starts_with("\"condition\" "), "{text:.40}");
        }
    }

    #[test]
    fn h122_core_names_are_of_few_characters_and_at_most_900() {
        assert!(is_name("a") && is_name("A0-_.~%") && is_name(&"x".repeat(900)));
        for name in ["", "a b", "a/b", "ä", "a'", &"x".repeat(901)] {
            assert!(!is_name(name), "{name:.20}");
        }
    }

    #[test]
    fn topics_of_two_projects_differ_and_the_home_is_fixed() {
        assert_ne!(TopicId::of("1", "23"), TopicId::of("12", "3"));
        let count = ShardCount::new(64).unwrap();
        assert_eq!(Condition::topic("news").home("42", count), Condition::topic("news").home("42", count));
        let homes: std::collections::BTreeSet<_> =
            (0..64).map(|n| Condition::topic(&format!("t{n}")).home("42", count)).collect();
        assert!(homes.len() > 16, "they are spread");
    }

    proptest! {
        #[test]
        fn any_text_is_answered_and_what_parses_is_a_program(text in "[ab'()&| ]{0,20}|('[ab]' in topics ?(&&|\\|\\|)? ?){0,7}") {
            if let Ok(condition) = Condition::parse(&text) {
                prop_assert!(is_program(condition.program(), condition.topics().len()));
                prop_assert!(condition.topics().iter().all(|name| is_name(name)));
            }
        }

        #[test]
        fn any_program_is_judged_and_run(program: Vec<u8>, topics in 0..6usize) {
            let _ = (is_program(&program, topics), holds(&program, |at| at % 2 == 0));
        }
    }
}
