//! `tidelog completions` and `man`: made from the definitions of the commands themselves.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};

use super::{Cli, output};

/// Print completions for a shell
#[derive(Args)]
pub struct CompletionsArguments {
    /// The shell
    shell: clap_complete::Shell,
}

/// Write the manual pages into a directory
#[derive(Args)]
pub struct ManArguments {
    /// The directory; made where it is missing
    dir: PathBuf,
}

pub fn completions(arguments: &CompletionsArguments) -> Result<()> {
    let mut bytes = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "tidelog", &mut bytes);
    output::print_bytes(&bytes)
}

pub fn man(arguments: &ManArguments) -> Result<()> {
    let dir = &arguments.dir;
    let failed = || format!("manual pages: {}: could not be written", dir.display());
    std::fs::create_dir_all(dir).with_context(failed)?;
    clap_mangen::generate_to(Cli::command(), dir).with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_of_the_commands_are_sound() {
        Cli::command().debug_assert();
    }
}
