import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.time.Duration;
import java.util.Arrays;
import java.util.Base64;
import java.util.List;
import java.util.Properties;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/** Apache Kafka's own client in make faults; what client.py does. */
public class Client {
    public static void main(String[] a) throws Exception {
        Properties p = new Properties();
        p.put("bootstrap.servers", a[1]);
        if (a[0].equals("produce")) produce(p);
        else consume(p, Arrays.stream(a).skip(2).map(s -> new TopicPartition(s.split(":")[0], Integer.parseInt(s.split(":")[1]))).toList());
    }

    static synchronized void say(String s) {
        System.out.println(s);
        System.out.flush();
    }

    static void produce(Properties p) throws Exception {
        p.put("acks", "all");
        p.put("delivery.timeout.ms", Integer.MAX_VALUE);
        p.put("max.block.ms", Integer.MAX_VALUE);
        p.put("request.timeout.ms", "3000");
        p.put("linger.ms", "5");
        try (KafkaProducer<byte[], byte[]> k = new KafkaProducer<>(p, new ByteArraySerializer(), new ByteArraySerializer());
                BufferedReader in = new BufferedReader(new InputStreamReader(System.in))) {
            for (String line; (line = in.readLine()) != null; ) {
                String[] w = line.split(" ");
                k.send(new ProducerRecord<>(w[1], Integer.valueOf(w[2]), null, Base64.getDecoder().decode(w[3])), (m, e) -> say(w[0] + " " + (e != null ? -1 : m.offset())));
            }
            k.flush();
        }
    }

    static void consume(Properties p, List<TopicPartition> from) {
        p.put("enable.auto.commit", "false");
        p.put("auto.offset.reset", "earliest");
        p.put("fetch.max.wait.ms", "200");
        p.put("request.timeout.ms", "3000");
        p.put("default.api.timeout.ms", "3000");
        try (KafkaConsumer<byte[], byte[]> k = new KafkaConsumer<>(p, new ByteArrayDeserializer(), new ByteArrayDeserializer())) {
            k.assign(from);
            from.forEach(t -> k.seek(t, 0));
            while (true) {
                k.poll(Duration.ofSeconds(1)).forEach(r -> say(r.topic() + " " + r.partition() + " " + r.offset() + " " + Base64.getEncoder().encodeToString(r.value())));
            }
        }
    }
}
