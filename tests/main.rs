//! The one integration binary: a module per subject.
#![allow(clippy::print_stdout, reason = "the harness shows it beside a failure")]

mod backup;
mod backup_pair;
mod cli;
mod control;
mod crash;
mod damage;
mod delegated;
mod disk;
mod failover;
mod fuzz;
mod fuzz_bodies;
mod identity;
mod kill;
mod limits;
mod modes;
mod nbd;
mod operator;
mod repair;
mod replication;
mod resync;
mod rewind;
mod serve;
mod several;
mod supply;
mod support;
mod tidy;
