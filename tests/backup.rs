//! Backups and their way back: what stock restic makes of a repository, what an incremental reads,
//! and what a run that must not count leaves behind.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tidelog::backup::{
    BackupPlan, FileSink, MANIFEST_VERSION, Manifest, ManifestVolume, Parent, Progress, Repository,
    RepositoryConfig, RepositoryError, RestoreSink, Stop,
};
use tidelog::group::{Allocation, Extent, GroupError, Read, Role, View, Volume};
use tidelog::units::{EpochId, GroupId, LogTime, Lsn, Name, VolumeNumber};

const FILE_BYTES: usize = 4 << 20;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// Volumes in memory, with a count of the bytes read and a place that cannot be.
struct RamView {
    volumes: Vec<(Volume, Mutex<Vec<u8>>)>,
    bytes_read: AtomicU64,
    broken: Mutex<Option<(u32, u64)>>,
    /// Blocks of zeros are holes.
    sparse: AtomicBool,
}

impl RamView {
    fn new(sizes: &[(&str, usize)]) -> RamView {
        let mut seed = 1u64;
        let volumes = sizes.iter().enumerate().map(|(index, (volume, size))| {
            let mut bytes = vec![0; *size];
            // A third noise, a third text, a third nothing.
            for block in bytes[..size / 3].chunks_mut(8) {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                block.copy_from_slice(&seed.to_le_bytes()[..block.len()]);
            }
            for (at, byte) in bytes[size / 3..2 * size / 3].iter_mut().enumerate() {
                *byte = b"tidelog\n"[at % 8];
            }
            let number = VolumeNumber(index as u32 + 1);
            let (name, size_bytes) = (name(volume), *size as u64);
            let volume = Volume { number, name, size_bytes, restore_lsn: None, restoring: false };
            (volume, Mutex::new(bytes))
        });
        RamView {
            volumes: volumes.collect(),
            bytes_read: AtomicU64::new(0),
            broken: Mutex::new(None),
            sparse: AtomicBool::new(false),
        }
    }

    fn bytes(&self, volume: usize) -> Vec<u8> {
        self.volumes[volume].1.lock().unwrap().clone()
    }

    fn write(&self, volume: usize, offset: usize, data: &[u8]) {
        self.volumes[volume].1.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
    }

    fn take_bytes_read(&self) -> u64 {
        self.bytes_read.swap(0, Ordering::SeqCst)
    }
}

impl View for RamView {
    fn volumes(&self) -> Vec<Volume> {
        self.volumes.iter().map(|(volume, _)| volume.clone()).collect()
    }

    fn read(&self, reads: &mut [Read<'_>]) {
        let broken = *self.broken.lock().unwrap();
        for read in reads {
            self.bytes_read.fetch_add(read.buffer.len() as u64, Ordering::SeqCst);
            let end = read.offset + read.buffer.len() as u64;
            if broken.is_some_and(|(volume, at)| {
                volume == read.volume.0 && (read.offset..end).contains(&at)
            }) {
                let what = "block 7 does not have its checksum".to_owned();
                read.result = Err(GroupError::Damaged { group: name("g"), what });
                continue;
            }
            let (_, bytes) =
                self.volumes.iter().find(|(volume, _)| volume.number == read.volume).unwrap();
            let bytes = bytes.lock().unwrap();
            read.buffer.copy_from_slice(&bytes[read.offset as usize..end as usize]);
        }
    }

    fn extents(
        &self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<Extent>, GroupError> {
        if !self.sparse.load(Ordering::SeqCst) {
            return Ok(vec![Extent { offset, length, allocation: Allocation::Data }]);
        }
        let (_, bytes) = self.volumes.iter().find(|(known, _)| known.number == volume).unwrap();
        let bytes = bytes.lock().unwrap();
        let mut extents: Vec<Extent> = Vec::new();
        for at in (offset..offset + length).step_by(4096) {
            let block = &bytes[at as usize..(at as usize + 4096).min(bytes.len())];
            let is_hole = block.iter().all(|byte| *byte == 0);
            let allocation = if is_hole { Allocation::Hole } else { Allocation::Data };
            let length = block.len() as u64;
            let full = extents.len() == limit;
            match extents.last_mut() {
                Some(last) if last.allocation == allocation => last.length += length,
                _ if full => break,
                _ => extents.push(Extent { offset: at, length, allocation }),
            }
        }
        Ok(extents)
    }
}

struct Bench {
    dir: tempfile::TempDir,
    repository: Repository,
    view: Arc<RamView>,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("password"), "correct horse\n").unwrap();
        let repository = Repository::new(config(dir.path()), 7).unwrap();
        let view = Arc::new(RamView::new(&[
            ("zeta", 3 * FILE_BYTES + 4096),
            ("alpha", FILE_BYTES + 12288),
            ("manifest.json", 4096),
        ]));
        Bench { dir, repository, view }
    }

    fn manifest(&self, lsn: u64) -> Manifest {
        Manifest {
            version: MANIFEST_VERSION,
            group: name("g"),
            group_id: GroupId([1; 16]),
            job: name("nightly"),
            job_id: EpochId(5),
            slot: LogTime(1_700_000_000_000_000_000),
            epoch: EpochId(u64::MAX - 1),
            lsn: Lsn(lsn),
            time: LogTime(1_700_000_000_000_000_000 + lsn),
            node: name("b"),
            role: Role::Secondary,
            volumes: self
                .view
                .volumes()
                .into_iter()
                .map(|volume| ManifestVolume {
                    number: volume.number,
                    name: volume.name,
                    size_bytes: volume.size_bytes,
                })
                .collect(),
            stale: false,
            reasons: Vec::new(),
        }
    }

    fn plan(&self, lsn: u64, parent: Option<Parent>) -> BackupPlan {
        BackupPlan {
            view: self.view.clone(),
            manifest: self.manifest(lsn),
            parent,
            stop: Stop::new(),
            progress: Progress::new(),
        }
    }

    /// Snapshots of any kind: a list of ours would not show one that the library saved by itself.
    fn snapshot_count(&self) -> usize {
        sorted(&self.dir.path().join("repository/snapshots")).len()
    }

    fn restic(&self, arguments: &[&str]) -> String {
        let output = Command::new("restic")
            .args(["--no-cache", "--repo"])
            .arg(self.dir.path().join("repository"))
            .arg("--password-file")
            .arg(self.dir.path().join("password"))
            .args(arguments)
            .output()
            .expect("restic is needed: apt-get install restic");
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "restic {arguments:?}: {text}");
        text
    }

    /// The bytes of a volume that stock restic restored, put together by the names' order.
    fn restored_by_restic(&self, target: &Path, volume: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        for dir in sorted(&target.join("g/data").join(volume)) {
            for file in sorted(&dir) {
                bytes.extend(std::fs::read(file).unwrap());
            }
        }
        bytes
    }
}

fn config(dir: &Path) -> RepositoryConfig {
    RepositoryConfig {
        name: "main".to_owned(),
        url: dir.join("repository").display().to_string(),
        password_file: dir.join("password"),
    }
}

fn sorted(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// The manifest's field names and forms, which later versions and people with `jq` read.
const GOLDEN_MANIFEST: &str = r#"{
  "version": 1,
  "group": "g",
  "group_id": "01010101010101010101010101010101",
  "job": "nightly",
  "job_id": "0000000000000005",
  "slot": "2023-11-14T22:13:20Z",
  "epoch": "fffffffffffffffe",
  "lsn": 4096,
  "time": "2023-11-14T22:13:20.000004096Z",
  "node": "b",
  "role": "secondary",
  "volumes": [
    {
      "number": 1,
      "name": "zeta",
      "size_bytes": 12587008
    },
    {
      "number": 2,
      "name": "alpha",
      "size_bytes": 4206592
    },
    {
      "number": 3,
      "name": "manifest.json",
      "size_bytes": 4096
    }
  ],
  "reasons": []
}"#;

/// Whether restic can be run; missing where CI runs is an error.
fn restic_is_there() -> bool {
    let there = Command::new("restic").arg("version").output().is_ok();
    assert!(there || std::env::var_os("CI").is_none(), "restic is needed: apt-get install restic");
    there
}

#[test]
fn stock_restic_checks_the_repository_and_restores_the_image() {
    if !restic_is_there() {
        return;
    }
    let bench = Bench::new();
    bench.repository.init().unwrap();
    let made = bench.repository.backup(bench.plan(4096, None)).unwrap();
    let objects = bench.repository.objects();
    assert!(objects.create("slots/x/claim-1", b"{}").unwrap());
    let checked = bench.restic(&["check", "--read-data"]);
    assert!(checked.contains("no errors were found"), "{checked}");
    let target = bench.dir.path().join("restored");
    bench.restic(&["restore", &made.id, "--target", target.to_str().unwrap()]);
    for (index, volume) in ["zeta", "alpha", "manifest.json"].into_iter().enumerate() {
        assert!(bench.restored_by_restic(&target, volume) == bench.view.bytes(index), "{volume}");
    }
    let json = std::fs::read_to_string(target.join("g/tidelog.json")).unwrap();
    assert_eq!(json, GOLDEN_MANIFEST);
    assert_eq!(serde_json::from_str::<Manifest>(&json).unwrap(), bench.manifest(4096));

    // The description is what lists are made from, and what verify compares with.
    let snapshot = bench.restic(&["cat", "snapshot", &made.id]);
    assert!(snapshot.contains("2023-11-14T22:13:20.000004096"), "the image's moment: {snapshot}");
    let found = bench.restic(&["snapshots", "--json", "--tag", "tidelog,group:g,job:nightly"]);
    assert!(found.contains(&made.id), "{found}");
    assert!(objects.read("slots/x/claim-1").unwrap().is_some(), "restic left the claims alone");
    bench.repository.check(true).unwrap();
}

#[test]
fn an_incremental_reads_only_what_changed_and_is_logically_full() {
    let bench = Bench::new();
    bench.repository.init().unwrap();
    let first = bench.repository.backup(bench.plan(4096, None)).unwrap();
    assert!(first.stats.bytes_read > 0 && first.stats.bytes_added > 0);
    bench.view.take_bytes_read();

    // One block changes, in the third file of zeta.
    let at = 2 * FILE_BYTES + 8192;
    bench.view.write(0, at, &[9; 4096]);
    let volumes = bench.view.volumes();
    let parent = |id: &str, lsn| Parent {
        id: id.to_owned(),
        manifest: bench.manifest(lsn),
        changed: vec![
            (volumes[0].clone(), vec![(at as u64, 4096)]),
            (volumes[1].clone(), Vec::new()),
            (volumes[2].clone(), Vec::new()),
        ],
    };
    let plan = bench.plan(8192, Some(parent(&first.id, 4096)));
    let progress = plan.progress.clone();
    let second = bench.repository.backup(plan).unwrap();
    assert_eq!(bench.view.take_bytes_read(), FILE_BYTES as u64);
    assert_eq!(second.stats.bytes_read, FILE_BYTES as u64);
    let (done, total) = progress.bytes();
    assert!(total > 0 && done >= total, "{done} of {total}");
    assert_ne!(first.checksums[0], second.checksums[0]);
    assert_eq!(first.checksums[1..], second.checksums[1..]);

    // The third builds on the second; what the second read keeps the second's stamp.
    bench.view.write(1, 0, &[7; 512]);
    let mut third = parent(&second.id, 8192);
    third.changed[0].1.clear();
    third.changed[1].1.push((0, 512));
    // The other node makes it, for another job: the chain is the group's.
    let mut plan = bench.plan(12288, Some(third));
    plan.manifest.node = name("a");
    plan.manifest.job = name("hourly");
    let third = bench.repository.backup(plan).unwrap();
    assert_eq!(bench.view.take_bytes_read(), FILE_BYTES as u64);

    for (index, volume) in volumes.iter().enumerate() {
        let path = bench.dir.path().join(volume.name.as_str());
        let mut sink = FileSink::create(&path).unwrap();
        let progress = Progress::new();
        bench.repository.restore(&third.id, volume.name.as_str(), &mut sink, &progress).unwrap();
        assert!(std::fs::read(&path).unwrap() == bench.view.bytes(index), "{}", volume.name);
        assert_eq!(progress.bytes(), (volume.size_bytes, volume.size_bytes));
    }
    let (bytes, checksums) = bench.repository.verify(&third.id, &Progress::new()).unwrap();
    assert_eq!(bytes, bench.manifest(0).size_bytes());
    assert_eq!(checksums, third.checksums);
    let listed = bench.repository.list().unwrap();
    let ids: Vec<_> = listed.iter().map(|(entry, _)| entry.id.clone().unwrap()).collect();
    assert_eq!(ids, [first.id, second.id, third.id]);
    let (last, manifest) = listed.last().unwrap();
    assert_eq!((last.bytes_read, last.bytes_added), {
        let stats = third.stats;
        (stats.bytes_read, stats.bytes_added)
    });
    assert_eq!((manifest.node.as_str(), manifest.job.as_str()), ("a", "hourly"));
}

#[test]
fn a_second_backup_of_the_same_moment_has_its_own_manifest() {
    let bench = Bench::new();
    bench.repository.init().unwrap();
    let first = bench.repository.backup(bench.plan(4096, None)).unwrap();
    bench.view.take_bytes_read();
    let parent = Parent {
        id: first.id,
        manifest: bench.manifest(4096),
        changed: bench.view.volumes().into_iter().map(|volume| (volume, Vec::new())).collect(),
    };
    let mut plan = bench.plan(4096, Some(parent));
    // As many bytes as before.
    plan.manifest.node = name("c");
    let second = bench.repository.backup(plan).unwrap();
    assert_eq!(bench.view.take_bytes_read(), 0);
    bench.repository.verify(&second.id, &Progress::new()).unwrap();
}

#[test]
fn holes_are_not_read_and_come_back_as_holes() {
    let bench = Bench::new();
    bench.repository.init().unwrap();
    bench.view.sparse.store(true, Ordering::SeqCst);
    // Every other block of the last third of zeta, more runs than are told at once.
    let start = (2 * FILE_BYTES + (1 << 20)) / 8192 * 8192;
    for at in (start..3 * FILE_BYTES).step_by(8192) {
        bench.view.write(0, at, &[1; 4096]);
    }
    let made = bench.repository.backup(bench.plan(4096, None)).unwrap();
    let data = |volume: usize| {
        let blocks = bench.view.bytes(volume);
        blocks.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0)).count() as u64
            * 4096
    };
    let expected = (0..3).map(data).sum::<u64>();
    assert_eq!(bench.view.take_bytes_read(), expected);
    assert_eq!(made.stats.bytes_read, expected);
    let path = bench.dir.path().join("alpha");
    let mut sink = FileSink::create(&path).unwrap();
    bench.repository.restore(&made.id, "alpha", &mut sink, &Progress::new()).unwrap();
    assert!(std::fs::read(&path).unwrap() == bench.view.bytes(1));
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
    assert!(blocks * 512 < bench.view.volumes()[1].size_bytes, "{blocks} blocks: not sparse");
}

#[test]
fn a_repository_that_takes_no_packs_gets_no_snapshot() {
    let bench = Bench::new();
    bench.repository.init().unwrap();
    for dir in sorted(&bench.dir.path().join("repository/data")) {
        std::fs::remove_dir(&dir).unwrap();
        std::fs::write(&dir, b"").unwrap();
    }
    let error = bench.repository.backup(bench.plan(4096, None)).unwrap_err();
    assert!(error.to_string().starts_with("repository main: "), "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
    assert_eq!(bench.snapshot_count(), 0);
}

#[test]
fn a_source_that_cannot_be_read_leaves_no_snapshot() {
    let bench = Bench::new();
    bench.repository.init().unwrap();
    *bench.view.broken.lock().unwrap() = Some((1, FILE_BYTES as u64 + 5));
    let error = bench.repository.backup(bench.plan(4096, None)).unwrap_err();
    assert!(error.to_string().contains("checksum"), "{error}");
    assert_eq!(bench.snapshot_count(), 0);
    *bench.view.broken.lock().unwrap() = None;
    bench.repository.backup(bench.plan(4096, None)).unwrap();
    assert_eq!((bench.snapshot_count(), bench.repository.list().unwrap().len()), (1, 1));
}

#[test]
fn a_run_that_was_ended_leaves_no_snapshot() {
    let bench = Bench::new();
    bench.repository.init().unwrap();
    let plan = bench.plan(4096, None);
    plan.stop.stop("the claim was taken over");
    let error = bench.repository.backup(plan).unwrap_err();
    assert!(matches!(error, RepositoryError::Stopped { .. }), "{error}");
    assert_eq!(bench.snapshot_count(), 0);
}

/// A sink that fails at its second write.
struct FullSink(u32);

impl RestoreSink for FullSink {
    fn begin(&mut self, _size_bytes: u64) -> Result<(), String> {
        Ok(())
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Result<(), String> {
        self.0 += 1;
        if self.0 > 1 { Err("no space left".to_owned()) } else { Ok(()) }
    }

    fn zero(&mut self, _offset: u64, _length: u64) -> Result<(), String> {
        Ok(())
    }

    fn finish(&mut self) -> Result<(), String> {
        Ok(())
    }
}

#[test]
fn every_failure_names_the_repository_and_the_next_command() {
    let bench = Bench::new();
    let text = |error: RepositoryError| error.to_string();
    let missing = text(bench.repository.id().unwrap_err());
    assert!(missing.contains("repository init main"), "{missing}");
    let id = bench.repository.init().unwrap();
    assert_eq!(bench.repository.id().unwrap(), id);
    assert!(text(bench.repository.init().unwrap_err()).contains("exists already"));
    let mut full = config(bench.dir.path());
    full.url = bench.dir.path().display().to_string();
    let full = text(Repository::new(full, 8).unwrap().init().unwrap_err());
    assert!(full.contains("is not empty"), "{full}");
    let mut file = config(bench.dir.path());
    file.url = bench.dir.path().join("password").display().to_string();
    let file = Repository::new(file, 8).unwrap();
    assert!(text(file.init().unwrap_err()).contains("password: "), "names the place");
    assert!(text(file.id().unwrap_err()).contains("not a directory"));

    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("password"), "wrong\n").unwrap();
    let mut wrong = config(bench.dir.path());
    wrong.password_file = other.path().join("password");
    let wrong = text(Repository::new(wrong, 8).unwrap().id().unwrap_err());
    assert!(wrong.contains("is not this repository's password"), "{wrong}");
    let mut absent = config(bench.dir.path());
    absent.password_file = other.path().join("none");
    assert!(text(Repository::new(absent, 8).unwrap().id().unwrap_err()).contains("none"));
    let mut url = config(bench.dir.path());
    url.url = "s3://bucket/prefix".to_owned();
    assert!(text(Repository::new(url, 8).err().unwrap()).contains("s3://bucket/prefix"));

    let unknown = text(bench.repository.verify("0123456789", &Progress::new()).unwrap_err());
    assert!(unknown.contains("backup list"), "{unknown}");
    let made = bench.repository.backup(bench.plan(4096, None)).unwrap();
    let none = bench.repository.restore(&made.id, "beta", &mut FullSink(0), &Progress::new());
    assert!(text(none.unwrap_err()).contains("alpha"));
    let full = bench.repository.restore(&made.id, "zeta", &mut FullSink(0), &Progress::new());
    assert!(text(full.unwrap_err()).contains("no space left"));
    bench.repository.forget(&made.id).unwrap();
    assert!(bench.repository.list().unwrap().is_empty());
}

#[test]
fn damage_in_a_pack_is_found_by_verify_and_by_check() {
    let bench = Bench::new();
    bench.repository.init().unwrap();
    let made = bench.repository.backup(bench.plan(4096, None)).unwrap();
    for dir in sorted(&bench.dir.path().join("repository/data")) {
        for pack in sorted(&dir) {
            let mut bytes = std::fs::read(&pack).unwrap();
            if bytes.len() > 100_000 {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                std::fs::write(&pack, bytes).unwrap();
            }
        }
    }
    let verified = bench.repository.verify(&made.id, &Progress::new()).unwrap_err();
    assert!(matches!(verified, RepositoryError::Damaged { .. }), "{verified}");
    assert!(bench.repository.check(true).is_err());
    assert!(bench.repository.check(false).is_ok(), "the structure is whole");
}

#[test]
fn a_parent_that_cannot_be_read_costs_a_full_read_and_not_the_backup() {
    let bench = Bench::new();
    bench.repository.init().unwrap();
    let first = bench.repository.backup(bench.plan(4096, None)).unwrap();
    bench.view.take_bytes_read();
    let unchanged = bench.view.volumes().into_iter().map(|volume| (volume, Vec::new())).collect();
    let parent =
        Parent { id: first.id.clone(), manifest: bench.manifest(4096), changed: unchanged };
    std::fs::remove_file(bench.dir.path().join("repository/snapshots").join(&first.id)).unwrap();
    let second = bench.repository.backup(bench.plan(8192, Some(parent))).unwrap();
    assert!(bench.view.take_bytes_read() > 4 * FILE_BYTES as u64, "everything was read anew");
    assert_eq!(second.checksums, first.checksums);
    assert_eq!(bench.repository.verify(&second.id, &Progress::new()).unwrap().1, first.checksums);
}
