"""produce (lines of stdin) and consume (lines to stdout) with a Python client: kafka-python or confluent-kafka."""
import argparse
import sys

p = argparse.ArgumentParser()
p.add_argument("op", choices=["produce", "consume"])
p.add_argument("lib", choices=["kafka-python", "confluent-kafka"])
p.add_argument("--bootstrap")
p.add_argument("--topic")
p.add_argument("--codec", default="none")
p.add_argument("--group")
p.add_argument("--count", type=int)
a = p.parse_args()
codec = None if a.codec == "none" else a.codec
lines = [l.rstrip("\n").encode() for l in sys.stdin] if a.op == "produce" else []
out = sys.stdout.buffer

if a.lib == "kafka-python":
    from kafka import KafkaConsumer, KafkaProducer, TopicPartition

    if a.op == "produce":
        k = KafkaProducer(bootstrap_servers=a.bootstrap, compression_type=codec, acks="all")
        sent = [k.send(a.topic, l) for l in lines]
        k.flush()
        for f in sent:
            f.get(timeout=20)
        k.close()
    else:
        k = KafkaConsumer(bootstrap_servers=a.bootstrap, group_id=a.group, enable_auto_commit=False, auto_offset_reset="earliest", consumer_timeout_ms=20000)
        if a.group:
            k.subscribe([a.topic])
        else:
            k.assign([TopicPartition(a.topic, 0)])
            k.seek_to_beginning()
        n = 0
        for r in k:
            out.write(r.value + b"\n")
            n += 1
            if n == a.count:
                break
        if a.group:
            k.commit()
        k.close()
else:
    from confluent_kafka import Consumer, Producer, TopicPartition

    if a.op == "produce":
        failed = []
        k = Producer({"bootstrap.servers": a.bootstrap, "compression.type": a.codec, "enable.idempotence": True})
        for l in lines:
            k.produce(a.topic, l, on_delivery=lambda err, _: failed.append(err) if err else None)
            k.poll(0)
        if k.flush(20) or failed:
            sys.exit("not delivered: %s" % failed[:3])
    else:
        k = Consumer({"bootstrap.servers": a.bootstrap, "group.id": a.group or "none", "enable.auto.commit": False, "auto.offset.reset": "earliest"})
        if a.group:
            k.subscribe([a.topic])
        else:
            k.assign([TopicPartition(a.topic, 0, 0)])
        n = 0
        while n < a.count:
            m = k.poll(20)
            if m is None or m.error():
                sys.exit("after %d records: %s" % (n, m and m.error()))
            out.write(m.value() + b"\n")
            n += 1
        if a.group:
            k.commit(asynchronous=False)
        k.close()
