//! The states of replication, and their names.

/// What replication of a group with a peer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicationState {
    /// Nothing to do, or nobody to do it with.
    Idle,
    /// The secondary has, or had a moment ago, all there is.
    Streaming,
    /// The secondary gets what it missed.
    CatchingUp,
    /// Stopped by command, for now.
    Paused,
    /// It cannot go on by itself.
    Blocked,
    /// Both were primary, and each has what the other lacks.
    SplitBrain,
}

impl ReplicationState {
    /// As status shows it.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            ReplicationState::Idle => "idle",
            ReplicationState::Streaming => "streaming",
            ReplicationState::CatchingUp => "catching-up",
            ReplicationState::Paused => "paused",
            ReplicationState::Blocked => "blocked",
            ReplicationState::SplitBrain => "split-brain",
        }
    }
}
