//! Where there is a GPU, one rank conforms (NCCL refuses two ranks on one GPU); where there is none, every rank says so.

use super::{Gpu, start};
use crate::Error;
use crate::comm::thread::ThreadWorld;
use crate::testing::conformance;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn one_rank_conforms_or_there_is_no_gpu() {
    let Err(lacking) = Gpu::open(0) else {
        ThreadWorld::new(1).run(|host| conformance(&*start(&*host, 0, TIMEOUT).expect("a GPU and NCCL")));
        return;
    };
    println!("skipped for lack of a GPU: {lacking}");
    for error in ThreadWorld::new(3).run(|host| start(&*host, 0, TIMEOUT).err()) {
        assert!(matches!(&error, Some(Error::Engine(text)) if *text == lacking), "{error:?}");
    }
}
