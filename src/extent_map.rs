//! Block → where its latest data is.
