//! The image at the horizon.
