//! The `tidelog` program: parse, call, print, exit status.

fn main() {}
