import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

public class Encode {
    public static void main(String[] arguments) throws Exception {
        var body = "{\"adapter\": \"scripture\", \"inputs\": \"In the beginning\"}";
        var request = HttpRequest.newBuilder(URI.create("http://127.0.0.1:8000/encode"))
            .header("content-type", "application/json")
            .POST(BodyPublishers.ofString(body))
            .build();
        var answer = HttpClient.newHttpClient().send(request, BodyHandlers.ofString());
        System.out.println(answer.body());
    }
}
