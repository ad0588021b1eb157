fn main() { use qm_hotplug::sys::{cgroup::*,device_filter::*};
 let r=CgroupRoot::find().unwrap(); println!("{:?}",r.path);
 let t=std::time::Instant::now();
 let f=DeviceFilter::open(&r).unwrap(); println!("{:?}",t.elapsed());
 let c=r.path.join("qmx"); std::fs::create_dir_all(&c).unwrap(); let c=r.open("/qmx").unwrap();
 let t=std::time::Instant::now();
 f.mark(&c).unwrap(); println!("{:?}",t.elapsed());
 println!("{:?}", DeviceFilter::standing(&r).unwrap());
 let f2=DeviceFilter::open_as(&r,"qmhp_lift1_xxxx").unwrap();
 println!("{:?} {:?}", f2.entries().unwrap(), f2.is_marked(&c));
 DeviceFilter::release(&r).unwrap(); std::fs::remove_dir(r.path.join("qmx")).unwrap();
 println!("{:?}", DeviceFilter::standing(&r).unwrap());
}
