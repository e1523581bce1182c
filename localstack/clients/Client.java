import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.time.Duration;
import java.util.HashSet;
import java.util.List;
import java.util.Properties;
import java.util.Set;
import java.util.concurrent.atomic.AtomicReference;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;

/** Apache Kafka's own client in the test of clients: BOOTSTRAP produce TOPIC | BOOTSTRAP group TOPIC GROUP COUNT. */
public class Client {
    public static void main(String[] a) throws Exception {
        Properties p = new Properties();
        p.put("bootstrap.servers", a[0]);
        if (a[1].equals("produce")) produce(p, a[2]);
        else group(p, a[2], a[3], Integer.parseInt(a[4]));
    }

    /** Sends the lines of stdin and prints one for each acknowledgement. */
    static void produce(Properties p, String topic) throws Exception {
        p.put("acks", "all");
        p.put("enable.idempotence", "true");
        AtomicReference<Exception> failed = new AtomicReference<>();
        try (KafkaProducer<String, String> k = new KafkaProducer<>(p, new StringSerializer(), new StringSerializer());
                BufferedReader in = new BufferedReader(new InputStreamReader(System.in))) {
            for (String line; (line = in.readLine()) != null; ) {
                k.send(new ProducerRecord<>(topic, line), (m, e) -> {
                    if (e != null) failed.set(e);
                    else System.out.println("acked");
                });
            }
            k.flush();
        }
        if (failed.get() != null) throw failed.get();
    }

    /** Consumes until it has seen so many values, and prints them. It commits often, and at the end. */
    static void group(Properties p, String topic, String group, int count) {
        p.put("group.id", group);
        p.put("auto.offset.reset", "earliest");
        p.put("enable.auto.commit", "false");
        p.put("max.poll.records", "100");
        Set<String> seen = new HashSet<>();
        try (KafkaConsumer<String, String> k = new KafkaConsumer<>(p, new StringDeserializer(), new StringDeserializer())) {
            k.subscribe(List.of(topic));
            while (seen.size() < count) {
                k.poll(Duration.ofMillis(500)).forEach(r -> {
                    seen.add(r.value());
                    System.out.println(r.value());
                });
                k.commitSync();
            }
        }
    }
}
