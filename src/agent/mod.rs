//! What hosts say.
