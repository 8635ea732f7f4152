//! The `tidelog` program: parse, call, print, exit status.

mod cli;

use std::process::ExitCode;

/// 0: done; 1: failed, with one line that names the object, the cause and the next command; 2: the
/// command line itself is wrong.
fn main() -> ExitCode {
    // Recovery is the restart: a panic must never leave half a process behind.
    let print_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print_panic(panic);
        std::process::abort();
    }));
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            cli::output::print_error(&format!("{error:#}"));
            ExitCode::from(1)
        }
    }
}

/// Who reads our output has seen enough: not a failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let source = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    source.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
