//! moe-serve
