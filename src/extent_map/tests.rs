//! The map against a naive model.
