//! Why an entry could not be applied, and which of its commands was at it.

use martlet_proto::cluster::{
    command::{Command, command},
    queue::operation,
};

use super::StateError;

/// An entry could not be applied: nothing of it happened, and this replica must not go on behind it.
#[derive(Debug, thiserror::Error)]
#[error("cannot apply command {position}, {kind}, of log index {index}: {source}")]
pub struct ApplyError {
    /// Log index of the entry.
    pub index: u64,
    /// Place of the command in its entry, from 0.
    pub position: usize,
    /// What the command is.
    pub kind: &'static str,
    /// Why.
    pub source: StateError,
}

impl ApplyError {
    /// The command, for people.
    #[must_use]
    pub fn operation(&self) -> String {
        format!("command {}, {}", self.position, self.kind)
    }

    /// Whether the entry is to blame, as far as can be seen here: whoever has the same rows and the same program meets it too.
    #[must_use]
    pub fn is_of_the_entry(&self) -> bool {
        !matches!(self.source, StateError::Rows(_))
    }
}

/// The name of a command, as of the `.proto` files.
pub(super) fn kind(command: Option<&Command>) -> &'static str {
    match command.and_then(|command| command.kind.as_ref()) {
        Some(command::Kind::Stamped(stamped)) => {
            match stamped.operation.as_ref().and_then(|operation| operation.kind.as_ref()) {
                Some(operation::Kind::Enqueue(_)) => "Enqueue",
                Some(operation::Kind::Register(_)) => "Register",
                Some(operation::Kind::Unregister(_)) => "Unregister",
                Some(operation::Kind::Resolve(_)) => "Resolve",
                Some(operation::Kind::Check(_)) => "Check",
                Some(operation::Kind::GroupChange(_)) => "GroupChange",
                Some(operation::Kind::GroupGet(_)) => "GroupGet",
                Some(operation::Kind::Subscribe(_)) => "Subscribe",
                Some(operation::Kind::Unsubscribe(_)) => "Unsubscribe",
                Some(operation::Kind::Publish(_)) => "Publish",
                Some(operation::Kind::FanOut(_)) => "FanOut",
                Some(operation::Kind::TokenInfo(_)) => "TokenInfo",
                Some(operation::Kind::Recall(_)) => "Recall",
                None => "an operation unknown here",
            }
        }
        Some(command::Kind::Acks(_)) => "Acks",
        Some(command::Kind::Expire(_)) => "Expire",
        Some(command::Kind::Raise(_)) => "Raise",
        Some(command::Kind::Seen(_)) => "Seen",
        Some(command::Kind::PublishesDone(_)) => "PublishesDone",
        Some(command::Kind::FanStep(_)) => "FanStep",
        None => "a command unknown here",
    }
}
