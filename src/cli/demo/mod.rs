//! `tidelog demo`: the whole product on one machine, step by step, each step with what it proved.
//!
//! Two appliances (processes of this binary) in a temporary directory talk through a proxy of the
//! demo's own (`proxy`), so that their link can be cut. Data are an ext4 image packed into the
//! binary (`packed`) and a stream of stamped blocks (`stamps`). Everything else goes through the
//! command line of the two nodes, as a person would type it.

mod node;
mod packed;
mod proxy;
mod report;
mod stamps;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use serde_json::Value;
use tidelog::nbd::Client;
use tidelog::units::ByteSize;

use node::{Node, free_address, wait_for};
use proxy::Proxy;
use report::{Report, line};
use stamps::{Area, Field, STAMP_BYTES, Writer};

const GROUP: &str = "shop";
const JOB: &str = "shop/nightly";
/// Volumes of the group, with their bytes. The ext4 image fills the first half of the first.
const VOLUMES: [(&str, u64); 2] = [("files", 32 << 20), ("stamps", 32 << 20)];
/// Bytes of a volume that are read at once.
const READ_BYTES: usize = 4 << 20;

/// Shows the whole product on one machine
///
/// Starts two appliances in a temporary directory, replicates a group between them, goes back in
/// time on the secondary, backs up where the decision says, restores, fails over, and compares
/// checksums at every step. Exit status 0 only if every comparison held.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Works in DIR and leaves everything running there, with the commands to go on by hand
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Runs the demo.
///
/// # Errors
///
/// Where a step fails or a comparison does not hold.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let dir = match &args.keep {
        Some(dir) => {
            fs::create_dir_all(dir).with_context(|| format!("{}: make it", dir.display()))?;
            let is_empty = fs::read_dir(dir)?.next().is_none();
            ensure!(is_empty, "{}: is not empty; name a new directory", dir.display());
            Workspace { path: dir.canonicalize()?, is_kept: AtomicBool::new(true) }
        }
        None => Workspace::temporary()?,
    };
    let mut story = Story::begin(&dir.path)?;
    let told = story.tell();
    if told.is_err() {
        // What the nodes said last is worth more than their directories.
        line(&format!("\n{}\n{}", story.a.log_tail(), story.b.log_tail()));
    }
    told?;
    if args.keep.is_some() {
        story.leave_running()?;
    }
    story.report.end();
    Ok(())
}

/// The directory of the demo; removed at the end unless it is kept.
struct Workspace {
    path: PathBuf,
    is_kept: AtomicBool,
}

impl Workspace {
    fn temporary() -> anyhow::Result<Workspace> {
        let mut random = [0; 4];
        tidelog::io::Entropy::fill(&tidelog::io::KernelEntropy, &mut random);
        let name = format!("tidelog-demo-{}", hex::encode(random));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).with_context(|| format!("{}: make it", path.display()))?;
        Ok(Workspace { path, is_kept: AtomicBool::new(false) })
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if !self.is_kept.load(Ordering::SeqCst) {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// A backup that a run made, and what it must contain.
struct Made {
    id: String,
    sums: Vec<String>,
}

struct Story {
    report: Report,
    dir: PathBuf,
    a: Node,
    b: Node,
    proxies: [Proxy; 2],
    field: Field,
    files: Vec<u8>,
}

impl Story {
    fn begin(dir: &Path) -> anyhow::Result<Story> {
        let repository = dir.join("repository");
        let a = Node::create("a", dir, &repository)?;
        let b = Node::create("b", dir, &repository)?;
        let mut proxies = Vec::new();
        for node in [&a, &b] {
            let listen = free_address()?;
            let proxy = Proxy::start(listen)?;
            node.configure(listen, proxy.address())?;
            proxies.push(proxy);
        }
        let proxies = proxies.try_into().ok().context("two nodes have two proxies")?;
        let files = packed::unpack()?;
        let after_files = files.len() as u64;
        let area = |(volume, bytes): (&str, u64), offset: u64| Area {
            export: format!("{GROUP}/{volume}"),
            offset,
            blocks: (bytes - offset) / STAMP_BYTES,
        };
        let field = Field { areas: vec![area(VOLUMES[0], after_files), area(VOLUMES[1], 0)] };
        Ok(Story { report: Report::new(), dir: dir.to_owned(), a, b, proxies, field, files })
    }

    fn tell(&mut self) -> anyhow::Result<()> {
        self.start_and_pair()?;
        self.make_group()?;
        let (writer, marked) = self.write_and_bookmark()?;
        let last = self.overwrite(writer)?;
        self.look_back_on_the_secondary(marked)?;
        let first = self.back_up_on_the_secondary()?;
        let (second, last) = self.back_up_with_the_link_cut(last)?;
        self.restore(&first)?;
        self.restore(&second)?;
        self.fail_over(last)
    }

    fn start_and_pair(&mut self) -> anyhow::Result<()> {
        self.report.step("Start two appliances, each a process of this binary");
        self.a.start()?;
        self.b.start()?;
        self.report
            .say(format!("in {}, peers talk through a proxy of the demo", self.dir.display()));

        self.report.step("Pair them with a one-time token");
        self.report.command("a", "peer invite");
        let invite = self.a.json("peer invite")?;
        let token = text(&invite, "token")?;
        let address = text(&invite, "address")?;
        self.report.command("b", &format!("peer join TOKEN --address {address}"));
        self.b.command(&format!("peer join {token} --address {address}"))?;
        for (node, peer) in [(&self.a, "b"), (&self.b, "a")] {
            wait_for(&format!("{} to know {peer}", node.name), || {
                Ok(node
                    .json("peer list")?
                    .to_string()
                    .contains(&format!("\"{peer}\""))
                    .then_some(()))
            })?;
        }
        let again = self.b.command(&format!("peer join {token} --address {address}"));
        self.report.prove(again.is_err(), "the token is worth nothing a second time")
    }

    fn make_group(&mut self) -> anyhow::Result<()> {
        self.report.step("Create a group with two volumes, replicate it, make a repository");
        self.on_a(&format!("group create {GROUP}"))?;
        for (volume, bytes) in VOLUMES {
            self.on_a(&format!("volume create {GROUP}/{volume} --size {bytes}"))?;
        }
        self.on_a(&format!("replicate {GROUP} --to b"))?;
        self.on_a("repository init main")?;
        self.on_a(&format!("job set {GROUP} nightly --repository main"))?;
        self.wait_until_streaming()
    }

    fn write_and_bookmark(&mut self) -> anyhow::Result<(Writer, u64)> {
        self.report.step("Write an ext4 image and a stream of stamped blocks through NBD");
        let mut client = Client::connect(&self.a.nbd(), &self.field.areas[0].export)?;
        client.write(0, &self.files)?;
        client.flush()?;
        client.disconnect()?;
        let writer = Writer::start(&self.a.nbd(), &self.field, 0)?;
        wait_for("1000 stamped blocks", || Ok((writer.answered() >= 1000).then_some(())))?;
        let status = self.a.status(GROUP)?;
        self.report.say(format!(
            "ext4 image of {}, {} stamped blocks answered, lag of b: {}",
            ByteSize(self.files.len() as u64),
            writer.answered(),
            lag(&status)
        ));

        self.report.step("Set a bookmark while the stream goes on");
        let marked = writer.answered();
        self.on_a(&format!("bookmark {GROUP} before"))?;
        wait_for("1000 more stamped blocks", || {
            Ok((writer.answered() >= marked + 1000).then_some(()))
        })?;
        Ok((writer, marked))
    }

    fn overwrite(&mut self, writer: Writer) -> anyhow::Result<u64> {
        self.report.step("Overwrite the ext4 image, and stop the stream");
        let mut client = Client::connect(&self.a.nbd(), &self.field.areas[0].export)?;
        client.write(0, &vec![0xdb; self.files.len()])?;
        let last = writer.stop()?;
        client.flush()?;
        let mut now = vec![0; self.files.len()];
        client.read(0, &mut now)?;
        client.disconnect()?;
        self.report.prove(
            now.iter().all(|byte| *byte == 0xdb),
            "a's live volume holds the overwritten data, no file system is left in it",
        )?;
        Ok(last)
    }

    fn look_back_on_the_secondary(&mut self, marked: u64) -> anyhow::Result<()> {
        self.report.step("Open the bookmark's image on the secondary, and check it");
        self.wait_until_equal()?;
        let words = format!("image open {GROUP} --at before --name past");
        self.report.command("b", &words);
        self.b.command(&words)?;
        let mut client = Client::connect(&self.b.nbd(), &format!("{GROUP}/files@past"))?;
        let mut past = vec![0; self.files.len()];
        client.read(0, &mut past)?;
        let refused = client.write(0, &[0; 512]).is_err();
        drop(client);
        self.report.prove(
            past == self.files && packed::is_clean_ext4(&past),
            format!("the ext4 image is there, clean, all {} equal", ByteSize(past.len() as u64)),
        )?;
        let contents = self.field.read(&self.b.nbd(), |export| format!("{export}@past"))?;
        let last = self.field.prefix(&contents)?;
        self.report.prove(
            last >= marked,
            format!(
                "both volumes show one prefix of the stream: writes 1 to {last}, of which {marked} \
                 were answered before the bookmark was asked for"
            ),
        )?;
        self.report.prove(refused, "the image takes no writes")?;
        self.report.command("b", &format!("image close {GROUP}@past"));
        self.b.command(&format!("image close {GROUP}@past"))?;
        Ok(())
    }

    fn back_up_on_the_secondary(&mut self) -> anyhow::Result<Made> {
        self.report.step("Run the backup job: the secondary is fit, so it makes the backup");
        let sums = self.live_sums(&self.a)?;
        let known = self.backups(&self.b)?;
        self.on_a(&format!("backup run {JOB}"))?;
        let made = self.wait_for_run(&self.b, "done", &known)?;
        let stood_down = self.wait_for_run(&self.a, "delegated", &known)?;
        self.report.prove(made["role"] == "secondary", "b made it, as the secondary")?;
        self.show_reasons("b", &made);
        self.report.prove(stood_down["node"] == "a", "a stood down for it")?;
        self.show_reasons("a", &stood_down);
        Ok(Made { id: text(&made, "id")?, sums })
    }

    fn back_up_with_the_link_cut(&mut self, last: u64) -> anyhow::Result<(Made, u64)> {
        self.report.step("Cut the link, write on, run the job again with a grace of a second");
        self.on_a(&format!("job set {GROUP} nightly --grace 1s"))?;
        self.wait_until_equal()?;
        for proxy in &self.proxies {
            proxy.cut();
        }
        wait_for("a to see that the link is cut", || {
            let status = self.a.status(GROUP)?;
            Ok((status["peers"][0]["link_state"] != "connected").then_some(()))
        })?;
        let writer = Writer::start(&self.a.nbd(), &self.field, last)?;
        wait_for("500 stamped blocks", || Ok((writer.answered() >= last + 500).then_some(())))?;
        let last = writer.stop()?;
        self.report.say(format!("hosts go on: {last} stamped blocks answered"));
        let capable = self.a.status(GROUP)?["backup_capable"].clone();
        self.report.say(format!("a on the copy at b: {capable}"));
        let sums = self.live_sums(&self.a)?;
        let known = self.backups(&self.a)?;
        self.on_a(&format!("backup run {JOB}"))?;
        let made = self.wait_for_run(&self.a, "done", &known)?;
        self.report.prove(made["role"] == "primary", "a made it, as the primary")?;
        self.show_reasons("a", &made);
        Ok((Made { id: text(&made, "id")?, sums }, last))
    }

    fn restore(&mut self, backup: &Made) -> anyhow::Result<()> {
        let short = backup.id.get(..8).unwrap_or(&backup.id);
        self.report.step(&format!("Restore backup {short}, and compare checksums"));
        for ((volume, _), wanted) in VOLUMES.iter().zip(&backup.sums) {
            let to = self.dir.join(format!("restored-{short}-{volume}"));
            let words = format!("backup restore {} --volume {volume} --to", backup.id);
            self.on_a(&format!("{words} {}", to.display()))?;
            let mut file = File::open(&to).with_context(|| format!("{}: open", to.display()))?;
            let got = sum_of(|buffer| Ok(file.read(buffer)?))?;
            fs::remove_file(&to)?;
            self.report.prove(got == *wanted, format!("{volume}: sha256 {}…", &got[..16]))?;
        }
        Ok(())
    }

    fn fail_over(&mut self, last: u64) -> anyhow::Result<()> {
        self.report.step("Mend the link, kill the primary with SIGKILL, promote the secondary");
        for proxy in &self.proxies {
            proxy.mend();
        }
        self.wait_until_streaming()?;
        let writer = Writer::start(&self.a.nbd(), &self.field, last)?;
        wait_for("500 stamped blocks", || Ok((writer.answered() >= last + 500).then_some(())))?;
        let last = writer.stop()?;
        self.wait_until_equal()?;
        let sums = self.live_sums(&self.a)?;
        self.a.kill()?;
        self.report.say("a is dead");
        wait_for("b to see that a is gone", || {
            let status = self.b.status(GROUP)?;
            Ok((status["peers"][0]["link_state"] != "connected").then_some(()))
        })?;
        let words = format!("promote {GROUP}");
        self.report.command("b", &words);
        self.b.command(&words)?;
        let status = self.b.status(GROUP)?;
        self.report.prove(status["role"] == "primary", "b is the primary")?;

        self.report.step("Read the data back from the new primary");
        let got = self.live_sums(&self.b)?;
        for ((volume, _), (got, wanted)) in VOLUMES.iter().zip(got.iter().zip(&sums)) {
            self.report.prove(got == wanted, format!("{volume}: sha256 {}…", &got[..16]))?;
        }
        let contents = self.field.read(&self.b.nbd(), str::to_owned)?;
        let found = self.field.prefix(&contents)?;
        self.report.prove(found == last, format!("all {last} stamped blocks that a answered"))?;
        let writer = Writer::start(&self.b.nbd(), &self.field, last)?;
        wait_for("500 stamped blocks", || Ok((writer.answered() >= last + 500).then_some(())))?;
        let last = writer.stop()?;
        let contents = self.field.read(&self.b.nbd(), str::to_owned)?;
        let found = self.field.prefix(&contents)?;
        self.report.prove(found == last, format!("b takes writes: the stream is at {last}"))
    }

    /// Takes the proxies out of the way and leaves both nodes running.
    fn leave_running(&mut self) -> anyhow::Result<()> {
        self.report.step("Leave both nodes running, without the proxy");
        self.b.stop()?;
        for (node, proxy) in [&self.a, &self.b].into_iter().zip(&self.proxies) {
            proxy.close();
            node.configure(proxy.address(), proxy.address())?;
        }
        self.b.start()?;
        self.a.start()?;
        for node in [&mut self.a, &mut self.b] {
            let socket = node.control_socket();
            line(&format!(
                "    export TIDELOG_SOCKET={}    # node {}",
                socket.display(),
                node.name
            ));
            node.let_go();
        }
        let (socket, repository) = (self.b.nbd_socket(), self.dir.join("repository"));
        line(&format!("    tidelog status; tidelog timeline {GROUP}; tidelog backup list {JOB}"));
        line(&format!("    nbdinfo 'nbd+unix:///{GROUP}/files?socket={}'", socket.display()));
        line(&format!(
            "    restic -r {} --password-file {} snapshots",
            repository.display(),
            self.b.password_file().display()
        ));
        line(&format!("    the end: pkill -f {}", self.dir.display()));
        Ok(())
    }

    fn on_a(&self, words: &str) -> anyhow::Result<()> {
        self.report.command("a", words);
        self.a.command(words)?;
        Ok(())
    }

    fn wait_until_streaming(&self) -> anyhow::Result<()> {
        wait_for("b to stream", || {
            let peer = &self.a.status(GROUP)?["peers"][0];
            Ok((peer["replication_state"] == "streaming").then_some(()))
        })
        .with_context(|| format!("{:?}", self.a.status(GROUP)))
    }

    /// Waits until b has durably what a has.
    fn wait_until_equal(&self) -> anyhow::Result<()> {
        wait_for("b to have all that a has", || {
            let (a, b) = (self.a.status(GROUP)?, self.b.status(GROUP)?);
            let same = a["log"]["head_lsn"] == b["log"]["durable_lsn"]
                && a["log"]["head_lsn"] == b["log"]["committed_lsn"];
            Ok((same && a["peers"][0]["durable_lsn"] == a["log"]["head_lsn"]).then_some(()))
        })
        .with_context(|| format!("a: {:?}\nb: {:?}", self.a.status(GROUP), self.b.status(GROUP)))
    }

    /// SHA-256 of each live volume, read through NBD.
    fn live_sums(&self, node: &Node) -> anyhow::Result<Vec<String>> {
        let mut sums = Vec::new();
        for (volume, bytes) in VOLUMES {
            let mut client = Client::connect(&node.nbd(), &format!("{GROUP}/{volume}"))?;
            let mut at = 0;
            sums.push(sum_of(|buffer| {
                let left = usize::try_from(bytes - at)?.min(buffer.len());
                client.read(at, &mut buffer[..left])?;
                at += left as u64;
                Ok(left)
            })?);
            client.disconnect()?;
        }
        Ok(sums)
    }

    fn backups(&self, node: &Node) -> anyhow::Result<BTreeSet<String>> {
        let list = node.json(&format!("backup list {JOB}"))?;
        let entries = list["backups"].as_array().cloned().unwrap_or_default();
        Ok(entries.iter().map(slot).collect())
    }

    /// Waits for a run of `node` itself, of a slot that is not among `known`, to end as `outcome`.
    fn wait_for_run(
        &self,
        node: &Node,
        outcome: &str,
        known: &BTreeSet<String>,
    ) -> anyhow::Result<Value> {
        wait_for(&format!("the run on {} to end as {outcome}", node.name), || {
            let list = node.json(&format!("backup list {JOB}"))?;
            let entries = list["backups"].as_array().cloned().unwrap_or_default();
            let mut new = entries
                .into_iter()
                .filter(|entry| entry["node"] == node.name && !known.contains(&slot(entry)));
            let ended =
                new.find(|entry| entry["outcome"] == outcome || entry["outcome"] == "failed");
            if let Some(entry) = &ended {
                ensure!(entry["outcome"] == outcome, "the run on {} failed: {entry}", node.name);
            }
            Ok(ended)
        })
    }

    fn show_reasons(&self, node: &str, entry: &Value) {
        for reason in entry["reasons"].as_array().into_iter().flatten() {
            let said = reason["text"].as_str().unwrap_or_default();
            self.report.say(format!("{node}, because: {said}"));
        }
    }
}

/// What names a run: its slot.
fn slot(entry: &Value) -> String {
    entry["slot"].to_string()
}

fn text(value: &Value, key: &str) -> anyhow::Result<String> {
    Ok(value[key].as_str().with_context(|| format!("no `{key}` in {value}"))?.to_owned())
}

fn lag(status: &Value) -> String {
    let lag = &status["peers"][0]["lag"];
    format!("{} bytes, {} operations, {} s", lag["bytes"], lag["operations"], lag["seconds"])
}

/// SHA-256 over what `read` gives until it gives nothing.
fn sum_of(mut read: impl FnMut(&mut [u8]) -> anyhow::Result<usize>) -> anyhow::Result<String> {
    let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match read(&mut buffer)? {
            0 => return Ok(hex::encode(digest.finish())),
            count => digest.update(&buffer[..count]),
        }
    }
}
