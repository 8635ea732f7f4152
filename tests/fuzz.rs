//! Replays the checked-in corpora of `fuzz/corpus`, each input also cut short at every length.

use std::fs;
use std::path::Path;

use crate::fuzz_bodies::TARGETS;

/// Inputs longer than this are not cut at every byte: a conversation is a connection each time.
const CUT_BYTES_MAX: usize = 400;

#[test]
fn every_corpus_is_replayed_and_no_input_does_harm() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (target, body) in TARGETS {
        let mut inputs = 0;
        let dir = corpora.join(target);
        let mut files: Vec<_> = fs::read_dir(&dir)
            .unwrap_or_else(|cause| panic!("{}: {cause}", dir.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        for file in files {
            let bytes = fs::read(&file).unwrap();
            // A failure names the input, since the panic's place is the same for all of them.
            println!("{}", file.display());
            body(&bytes);
            for length in 0..bytes.len().min(CUT_BYTES_MAX) {
                body(&bytes[..length]);
            }
            inputs += 1;
        }
        assert!(inputs > 0, "{target}: its corpus is empty");
    }
}

#[test]
fn every_target_has_a_wrapper_and_every_wrapper_a_target() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let wrappers = fs::read_dir(fuzz.join("fuzz_targets")).unwrap().count();
    assert_eq!(wrappers, TARGETS.len());
    for (target, _) in TARGETS {
        assert!(
            manifest.contains(&format!("name = \"{target}\"")),
            "{target}: not in the manifest"
        );
        let file = fuzz.join(format!("fuzz_targets/{target}.rs"));
        let wrapper = fs::read_to_string(&file).unwrap();
        assert!(wrapper.contains(&format!("bodies::{target}(")), "{}", file.display());
    }
}
