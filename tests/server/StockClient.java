import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.io.ByteArrayInputStream;

/** The JDK's own client with its default settings, which offer h2c: status and body, a line each. */
class StockClient {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        byte[] body = arguments[1].getBytes("UTF-8");
        for (int round = 0; round < 2; round++) {
            show(client, arguments[0], BodyPublishers.ofByteArray(body));
            show(client, arguments[0], BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body)));
        }
    }

    static void show(HttpClient client, String url, HttpRequest.BodyPublisher body) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url))
            .header("content-type", "application/json").POST(body).build();
        var answer = client.send(request, BodyHandlers.ofString());
        System.out.println(answer.statusCode() + " " + answer.version() + " " + answer.body());
    }
}
