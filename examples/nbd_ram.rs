//! Serves memory over NBD, to try clients and to measure the protocol without the engine:
//! `nbd_ram unix:/tmp/s 1G`.

use std::sync::Arc;

use tidelog::nbd::{NbdCounters, NbdLimits, NbdListen, RamDevice, RamExports, listen};
use tidelog::units::ByteSize;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, size] = &arguments[..] else { return Err("usage: nbd_ram ADDRESS SIZE".into()) };
    let ByteSize(size) = size.parse()?;
    let exports = RamExports(vec![
        Arc::new(RamDevice::new("g/v", size, false)),
        Arc::new(RamDevice::new("g/v@image", 1 << 20, true)),
    ]);
    let listen_at = NbdListen::new(address.parse()?);
    let counters = Arc::new(NbdCounters::default());
    let _server = listen(listen_at, Arc::new(exports), NbdLimits::default(), counters)?;
    loop {
        std::thread::park();
    }
}
