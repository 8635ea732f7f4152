//! One node from its configuration.
