// k6: many users at once. Overload may be told (503 with Retry-After); nothing else may break, and /health stays quick.
import http from "k6/http";
import { check } from "k6";
import { Counter, Trend } from "k6/metrics";

const url = __ENV.LATHE_URL;
const broken = new Counter("broken");
const overloaded = new Counter("overloaded");
const health = new Trend("health", true);

export const options = {
  scenarios: {
    users: {
      executor: "constant-vus",
      vus: Number(__ENV.K6_USERS || 200),
      duration: __ENV.K6_TIME || "60s",
      gracefulStop: "60s",
      exec: "user",
    },
    probe: {
      executor: "constant-arrival-rate",
      rate: 5,
      timeUnit: "1s",
      duration: __ENV.K6_TIME || "60s",
      preAllocatedVUs: 20,
      exec: "probe",
    },
  },
  thresholds: { broken: ["count==0"], health: ["p(99)<100"] },
};

export function user() {
  const body = {
    model: __ENV.LATHE_MODEL,
    prompt: `user ${__VU} asks ${__ITER}`,
    max_tokens: 8,
    temperature: 0,
  };
  const answer = http.post(`${url}/v1/completions`, JSON.stringify(body), {
    headers: { "Content-Type": "application/json" },
    timeout: "120s",
  });
  if (answer.status === 503 && answer.headers["Retry-After"]) overloaded.add(1);
  else if (!check(answer, { "200": (r) => r.status === 200 })) broken.add(1);
}

export function probe() {
  const answer = http.get(`${url}/health`);
  health.add(answer.timings.duration);
  if (answer.status !== 200) broken.add(1);
}
